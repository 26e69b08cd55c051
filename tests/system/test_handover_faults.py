"""What goes wrong while there is no supervisor, or while the next one takes over: nothing is left behind unsupervised.

gen ──left── relay ──right── sink        10.1.0.0/24, 10.2.0.0/24
"""

import contextlib
import os
import re
import resource
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.logging_shm.command import mcrlog_json
from tests.system.conftest import StartRelay
from tests.system.harness import (
    BIN,
    STOP_S,
    assert_perfect,
    receiver,
    relay_some,
    relayed_whole,
    send,
    template_of,
    wait_until,
)
from tests.system.test_handover import IN, OUT, is_alive, is_published, kill_supervisor, workers
from tools.netns import Line

FLOWS = ("--flows", "16")
FEW = 1000
MANY_INPUTS = 1100  # select(2) takes descriptors up to 1 023
RESTARTS = 3
SETTLED_LOOKS = 5


def relays_few(line: Line, folder: Path) -> None:
    relay_some(line, folder, FEW, *FLOWS)


def blocks(pid: int, number: signal.Signals) -> bool:
    """Whether a process lets a signal wait."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^SigBlk:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> number - 1 & 1)


def ends(process: "subprocess.Popen[str]") -> int:
    return process.wait(STOP_S)


def test_a_worker_that_dies_without_a_supervisor_is_followed_where_it_stopped(
    line: Line, start_relay: StartRelay, tmp_path: Path
) -> None:
    """With its ring empty when the next one looks at it, and with datagrams in it."""
    relay = start_relay(line.hosts[1], ("left",), 2)
    relay.add("r", IN, OUT)
    relays_few(line, tmp_path)
    victim = min(workers(relay))
    kill_supervisor(relay)
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: not is_alive(victim), "it has died")
    relay.start_again()
    relays_few(line, tmp_path)
    victim = min(workers(relay))
    kill_supervisor(relay)
    gen, _, sink = line.hosts
    with receiver(sink, tmp_path, "--interface", "left") as received:
        os.kill(victim, signal.SIGSTOP)  # so that no datagram is between ring and socket when it dies
        send(gen, "--interface", "right", "--rate", "20000", "--count", str(5 * FEW), *FLOWS)
        os.kill(victim, signal.SIGKILL)
        relay.start_again()
        assert_perfect(received.drain(5 * FEW), 5 * FEW)
    relay.stop()


def test_a_take_over_that_is_killed_half_way_loses_no_place_in_a_ring(
    line: Line, start_relay: StartRelay, tmp_path: Path
) -> None:
    relay = start_relay(line.hosts[1], ("left",), 2)
    relay.add("r", IN, OUT)
    relays_few(line, tmp_path)
    released, kept = sorted(workers(relay))
    kill_supervisor(relay)
    os.kill(kept, signal.SIGSTOP)  # only the other ends when it is released
    relay.process = relay.launch(relay.options)
    wait_until(lambda: not is_alive(released), "one is released")
    kill_supervisor(relay)
    assert "Took over" not in relay.text()
    relay.start_again()
    relays_few(line, tmp_path)
    assert not is_alive(kept)
    relay.stop()


def test_a_start_that_fails_leaves_all_to_the_next(line: Line, start_relay: StartRelay, tmp_path: Path) -> None:
    host = line.hosts[1]
    relay = start_relay(host)
    relay.add("r", IN, OUT)
    with relayed_whole(line, tmp_path, *FLOWS):
        kill_supervisor(relay)
        host.run(["nft", "add", "table", "netdev", f"mcr_{relay.instance}"])
        assert relay.launch([*relay.options, "--exclusive"]).wait(STOP_S) == 1
        host.run(["nft", "delete", "table", "netdev", f"mcr_{relay.instance}"])
        relay.start_again()
    assert "1 worker replaced" in relay.text()
    assert [rule["rule_id"] for rule in relay.ask("list-rules")] == ["r"]
    relay.stop()


def test_a_template_that_does_not_answer_is_ended(line: Line, start_relay: StartRelay, tmp_path: Path) -> None:
    relay = start_relay(line.hosts[1])
    relay.add("r", IN, OUT)
    former, template = workers(relay), template_of(relay)
    kill_supervisor(relay)
    template.suspend()
    relay.start_again()
    assert "did not answer and was killed" in relay.text()
    assert "had no template left: their rings were taken from themselves" in relay.text()
    assert not any(is_alive(pid) for pid in {*former, template.pid})
    relays_few(line, tmp_path)
    relay.stop()


def test_a_template_that_does_not_end_holds_nothing_up(line: Line, start_relay: StartRelay, tmp_path: Path) -> None:
    relay = start_relay(line.hosts[1])
    relay.add("r", IN, OUT)
    (former,) = workers(relay)
    template = template_of(relay)
    kill_supervisor(relay)
    os.kill(former, signal.SIGSTOP)  # so that the take-over is not through yet
    relay.process = relay.launch(relay.options)
    relay.wait_for_log("Removed")
    template.suspend()
    relay.wait_for_log("A former worker did not end in time, killed")
    relay.wait_for_log("Took over")
    assert not is_alive(template.pid)
    relays_few(line, tmp_path)
    relay.stop()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_in_the_middle_of_a_take_over_ends_everything(
    line: Line, start_relay: StartRelay, number: signal.Signals
) -> None:
    relay = start_relay(line.hosts[1])
    former, template = workers(relay), template_of(relay)
    kill_supervisor(relay)
    template.suspend()  # so that the next one waits for it
    relay.process = relay.launch(relay.options)
    wait_until(lambda: blocks(relay.pid, signal.SIGTERM), "it takes over")
    relay.process.send_signal(number)
    template.resume()
    assert ends(relay.process) == 0, relay.text()
    assert not any(is_alive(pid) for pid in {*former, template.pid})
    assert relay.leftovers() == []


def test_a_stop_while_starting_anew_is_a_stop(line: Line, start_relay: StartRelay) -> None:
    relay = start_relay(line.hosts[1])
    former = {*workers(relay), template_of(relay).pid}
    with relay.host.popen([str(BIN / "mcrctl"), "--socket", str(relay.socket), "restart"], stderr=-1) as client:
        relay.wait_for_log("Starting anew")
        relay.process.send_signal(signal.SIGTERM)
        assert ends(relay.process) == 0, relay.text()
        client.kill()
    assert not any(is_alive(pid) for pid in former)
    assert relay.leftovers() == []


def test_as_many_inputs_as_one_likes_are_kept(line: Line, start_relay: StartRelay, tmp_path: Path) -> None:
    relay = start_relay(line.hosts[1])
    rules = [(f"r{port}", f"10.1.0.2:{port}", "239.2.2.2:6001:right") for port in range(5001, 5001 + MANY_INPUTS)]
    relay.add_many(tmp_path, rules)
    with relayed_whole(line, tmp_path, "--group", "10.1.0.2"):
        result = relay.control("restart")
        assert result.returncode == 0, result.stderr
        wait_until(lambda: is_published(relay), "the next one could take over")
        kill_supervisor(relay)
        relay.start_again()
    assert len(relay.ask("list-rules")) == MANY_INPUTS
    assert "no template left" not in relay.text()
    relay.stop()


def test_a_supervisor_that_fails_is_taken_over_as_a_killed_one(
    line: Line, start_relay: StartRelay, tmp_path: Path
) -> None:
    """It has no descriptor left when it must start a process."""
    relay = start_relay(line.hosts[1])
    relay.add("r", IN, OUT)
    family = psutil.Process(relay.pid).children()
    with relayed_whole(line, tmp_path):
        resource.prlimit(relay.pid, resource.RLIMIT_NOFILE, (1, 4096))
        next(child for child in family if "relay.controlplane" in child.cmdline()).kill()
        assert ends(relay.process) == 1
        assert "The supervisor failed, workers go on relaying, the next mcrd takes over" in relay.text()
        assert relay.socket.is_socket()  # where clients wait
        relay.start_again()
    assert "1 worker replaced" in relay.text()
    relay.stop()


def descriptors(pid: int) -> list[str]:
    """What a process holds, without the numbers that differ from one restart to the next."""
    held = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            held.append(re.sub(r"\d+", "", str(descriptor.readlink())))
    return sorted(held)


def test_starting_anew_leaks_no_descriptor_and_leaves_no_zombie(line: Line, start_relay: StartRelay) -> None:
    relay = start_relay(line.hosts[1], ("left",), 2, "--exclusive")
    relay.add("r", IN, OUT)
    relay.add("unicast", "10.1.0.2:5001", OUT)

    history: list[list[list[str]]] = []

    def has_settled() -> bool:
        """Whether nothing has changed for half a second, and the former workers' last counters are taken in."""
        if len(psutil.Process(relay.pid).children()) != 2:
            return False
        history.append([descriptors(pid) for pid in (relay.pid, template_of(relay).pid, *sorted(workers(relay)))])
        if any(held.startswith("/dev/shm/") and held.endswith("(deleted)") for held in history[-1][0]):
            return False
        return history[-SETTLED_LOOKS:] == [history[-1]] * SETTLED_LOOKS

    held = []
    for _ in range(RESTARTS):
        assert relay.control("restart").returncode == 0
        history.clear()
        wait_until(has_settled, "no descriptor comes or goes")
        held.append(history[-1])
    assert held[1:] == held[:-1]
    relay.stop()


def test_cleaning_the_log_takes_nothing_from_workers_without_a_supervisor(
    line: Line, start_relay: StartRelay, tmp_path: Path
) -> None:
    relay = start_relay(line.hosts[1])
    relay.add("r", IN, OUT)
    with relayed_whole(line, tmp_path):
        kill_supervisor(relay)
        outcome = mcrlog_json("clean", "--instance", relay.instance)
        assert sorted(outcome["removed"]) == [f"mcr_{relay.instance}_controlplane", f"mcr_{relay.instance}_supervisor"]
        assert (len(outcome["kept"]), outcome["left_alone"]) == (5, [])
        relay.start_again()
    assert "1 worker replaced" in relay.text()
    relay.stop()
