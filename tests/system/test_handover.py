"""Workers outlive their supervisor, and the next one takes them over, under traffic.

gen ──left── relay ──right── sink        10.1.0.0/24, 10.2.0.0/24
"""

import contextlib
import itertools
import json
import os
import signal
import socket
import threading
from functools import partial
from pathlib import Path

import psutil
import pytest

from relay.dataplane.counters import StatsSegment
from relay.wording import counted
from tests.system.conftest import StartRelay
from tests.system.harness import (
    BIN,
    PPS,
    PYTHON,
    Relay,
    assert_perfect,
    receiver,
    relay_some,
    relayed_whole,
    send,
    sender,
    template_of,
    wait_until,
)
from tools.netns import Host, Line

TURNS = int(os.environ.get("MCR_HANDOVER_TURNS", "2"))  # of what is done again and again
KILLS = int(os.environ.get("MCR_HANDOVER_KILLS", "2"))  # of a supervisor that changes rules
IN, OUT = "239.1.1.1:5001", "239.2.2.2:6001:right"
MANY = 1000
FEW = 1000
ROOM = ("--ring-mib", "64")  # 0.6 s at PPS: the machine may be busy


def workers(relay: Relay) -> set[int]:
    return {worker["pid"] for worker in relay.ask("list-workers")}


def packets_relayed(relay: Relay) -> int:
    return int(relay.stats()["packets_relayed"])


def kill_supervisor(relay: Relay) -> None:
    relay.process.kill()
    relay.process.wait()
    wait_until(lambda: not relay_answers(relay), "the control plane has ended")


def relay_answers(relay: Relay) -> bool:
    """Whether a control plane of this relay is alive."""
    names = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    return any("relay.controlplane" in name and relay.instance in name for name in names)


def is_published(relay: Relay) -> bool:
    """Whether what runs now is what the next supervisor would find."""
    inventory = relay.socket.with_suffix(".inventory")
    if not inventory.exists():
        return False
    return {worker["pid"] for worker in json.loads(inventory.read_text())["workers"]} == workers(relay)


def add_to_lasting(relay: Relay) -> None:
    """Add a rule when the next supervisor could take over: then workers know that, too."""
    wait_until(lambda: is_published(relay), "the next one could take over")
    relay.add("r", IN, OUT)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def relayed_by_workers(relay: Relay, count: int) -> int:
    """What the workers have counted, also while nobody can be asked."""
    total = 0
    for core in Relay.cores(count):
        with StatsSegment.attach(core, relay.instance) as stats:
            total += int(stats.header["packets_relayed"])
    return total


def have_relayed(relay: Relay, count: int, goal: int) -> bool:
    return relayed_by_workers(relay, count) > goal


def says_again(relay: Relay, text: str, before: int) -> bool:
    return relay.text().count(text) > before


def joined(host: Host, group: str) -> bool:
    number = socket.inet_aton(group)[::-1].hex().upper()
    return number in str(host.run(["cat", "/proc/net/igmp"], capture_output=True).stdout)


@pytest.mark.parametrize("count", [1, 2])
def test_a_killed_supervisor_is_taken_over_without_loss(
    line: Line, start_relay: StartRelay, tmp_path: Path, count: int
) -> None:
    host = line.hosts[1]
    relay = start_relay(host, ("left",), count, *ROOM)
    add_to_lasting(relay)
    relay.add("other", "239.1.1.7:5001", "239.2.2.7:6001:right")
    with relayed_whole(line, tmp_path, "--flows", "16"):
        for _ in range(TURNS):
            wait_until(lambda: packets_relayed(relay) > 1000, "traffic flows")
            former = workers(relay)
            kill_supervisor(relay)
            goal = relayed_by_workers(relay, count) + PPS // 4
            wait_until(partial(have_relayed, relay, count, goal), "traffic flows without a supervisor")
            assert joined(host, "239.1.1.1")
            assert all(is_alive(pid) for pid in former)
            relay.start_again()
            assert not any(is_alive(pid) for pid in former)
            assert not former & workers(relay)
    assert [rule["rule_id"] for rule in relay.ask("list-rules")] == ["r", "other"]
    assert relay.text().count(f"{counted(count, 'worker')} replaced") == TURNS
    relay.assert_accounted()
    assert not joined(host, "239.1.1.9")
    relay.stop()
    assert not joined(host, "239.1.1.1")


@pytest.mark.parametrize("count", [1, 2])
def test_a_graceful_restart_loses_nothing(line: Line, start_relay: StartRelay, tmp_path: Path, count: int) -> None:
    relay = start_relay(line.hosts[1], ("left",), count, "--exclusive", *ROOM)
    add_to_lasting(relay)
    with relayed_whole(line, tmp_path, "--flows", "16"):
        for _ in range(2):
            former = workers(relay)
            result = relay.control("restart", "--graceful")
            assert (result.returncode, result.stdout) == (0, f"restarted: {counted(count, 'worker')} replaced\n")
            assert relay.process.poll() is None
            assert not former & workers(relay)
    assert [rule["rule_id"] for rule in relay.ask("list-rules")] == ["r"]
    assert "of this supervisor before its restart" in relay.text()
    assert "killed" not in relay.text()
    relay.assert_accounted()
    children = psutil.Process(relay.pid).children()
    assert all(child.status() != psutil.STATUS_ZOMBIE for child in children)
    relay.stop()


def test_a_restart_of_many_rules_keeps_them_all(line: Line, start_relay: StartRelay, tmp_path: Path) -> None:
    relay = start_relay(line.hosts[1], ("left",), 1, *ROOM)
    rules = [(f"r{i}", f"239.1.{i // 250}.{i % 250 + 1}:5001", f"239.2.2.2:{6001 + i % 5}:right") for i in range(MANY)]
    relay.add_many(tmp_path, rules)
    with relayed_whole(line, tmp_path, "--group", "239.1.0.1"):
        assert relay.control("restart").returncode == 0
    assert len(relay.ask("list-rules")) == MANY
    relay.stop()


def test_super_frames_survive_a_restart(line: Line, start_relay: StartRelay, tmp_path: Path) -> None:
    relay = start_relay(line.hosts[1], ("left",), 1, *ROOM)
    add_to_lasting(relay)
    with relayed_whole(line, tmp_path, "--burst", "40"):
        assert relay.control("restart").returncode == 0
    relay.stop()


def test_a_program_that_can_not_start_is_not_restarted_into(
    line: Line, start_relay: StartRelay, tmp_path: Path
) -> None:
    config = tmp_path / "relay.toml"
    config.write_text("stats_interval_s = 5\n")
    relay = start_relay(line.hosts[1], ("left",), 1, "--config", str(config))
    add_to_lasting(relay)
    former = workers(relay)
    config.write_text("nonsense = 5\n")
    with relayed_whole(line, tmp_path):
        result = relay.control("restart")
        assert result.returncode == 1
        assert "not restarted, the relay goes on as it is" in result.stderr
        assert f"{config}:1: nonsense" in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert workers(relay) == former
    relay.stop()


def test_a_client_waits_for_the_next_supervisor(line: Line, start_relay: StartRelay) -> None:
    relay = start_relay(line.hosts[1], ("left",), 1, *ROOM)
    add_to_lasting(relay)
    former = relay.pid
    kill_supervisor(relay)
    command = [str(BIN / "mcrctl"), "--socket", str(relay.socket), "ping"]
    with line.hosts[1].popen(command, stdout=-1, stderr=-1) as client:
        assert client.stderr is not None
        told = client.stderr.readline()
        relay.start_again()
        assert client.wait(30) == 0
    gone = f"mcrd (pid {former}) is gone: start it again with the same options, and it answers"
    assert told.startswith(f"mcrctl: {relay.socket}: {gone}: waiting ")
    relay.stop()


def test_unicast_inputs_are_held_all_the_time(line: Line, start_relay: StartRelay, tmp_path: Path) -> None:
    relay = start_relay(line.hosts[1], ("left",), 1, *ROOM)
    add_to_lasting(relay)
    relay.add("unicast", "10.1.0.2:5001", OUT)
    with relayed_whole(line, tmp_path, "--group", "10.1.0.2"):
        kill_supervisor(relay)
        relay.start_again()
    snmp = line.hosts[1].run(["cat", "/proc/net/snmp"], capture_output=True).stdout
    names, values = (text.split() for text in snmp.splitlines() if text.startswith("Udp:"))
    assert dict(zip(names, values, strict=True))["NoPorts"] == "0"
    relay.stop()


@pytest.mark.parametrize("options", [("--ring-mib", "8"), ("--num-workers", "2")])
def test_other_options_end_the_former_workers(line: Line, start_relay: StartRelay, options: tuple[str, ...]) -> None:
    relay = start_relay(line.hosts[1], ("left",), 1, *ROOM)
    add_to_lasting(relay)
    former = workers(relay)
    kill_supervisor(relay)
    relay.start_again(["--interface", "left", *options])
    relay.wait_for_log("have other cores or rings and were ended")
    assert not any(is_alive(pid) for pid in former)
    assert [rule["rule_id"] for rule in relay.ask("list-rules")] == ["r"]
    relay.stop()


def kill_with_template(relay: Relay) -> None:
    """End the template, and the supervisor before it could start another."""
    template = template_of(relay)
    relay.process.send_signal(signal.SIGSTOP)
    template.kill()
    wait_until(lambda: not is_alive(template.pid), "the template has ended")
    kill_supervisor(relay)


def test_without_a_template_workers_are_taken_over_by_what_they_have_open(
    line: Line, start_relay: StartRelay, tmp_path: Path
) -> None:
    """Super-frames wait in the copy arena; the second time the supervisor that died had taken over in this way."""
    relay = start_relay(line.hosts[1], ("left",), 2, *ROOM)
    add_to_lasting(relay)
    with relayed_whole(line, tmp_path, "--flows", "16", "--burst", "40"):
        for _ in range(2):
            wait_until(lambda: packets_relayed(relay) > 1000, "traffic flows")
            wait_until(lambda: is_published(relay), "the next one could take over")
            former = workers(relay)
            kill_with_template(relay)
            relay.start_again()
            assert not any(is_alive(pid) for pid in former)
            assert joined(line.hosts[1], "239.1.1.1")
    assert relay.text().count("had no template left: their rings were taken from themselves") == 2
    assert relay.text().count("2 workers replaced") == 2
    assert [rule["rule_id"] for rule in relay.ask("list-rules")] == ["r"]
    relay.assert_accounted()
    relay.stop()


def test_where_nothing_may_be_taken_from_workers_they_are_ended(line: Line, start_relay: StartRelay) -> None:
    relay = start_relay(line.hosts[1], ("left",), 1)
    add_to_lasting(relay)
    former = workers(relay)
    kill_with_template(relay)
    relay.behind = ("setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace")  # as in a container
    relay.start_again()
    relay.wait_for_log("can't be taken from it: Permission denied: that needs CAP_SYS_PTRACE")
    relay.wait_for_log("had no template left and were ended")
    assert not any(is_alive(pid) for pid in former)
    assert [rule["rule_id"] for rule in relay.ask("list-rules")] == ["r"]
    relay.stop()


def test_a_template_that_still_loads_when_its_supervisor_dies_keeps_everything(
    line: Line, start_relay: StartRelay, tmp_path: Path
) -> None:
    """It was handed all that is kept when it was started; nothing is taken from workers."""
    relay = start_relay(line.hosts[1], ("left",), 1, *ROOM)
    add_to_lasting(relay)
    relay.add("unicast", "10.1.0.2:5001", OUT)
    with relayed_whole(line, tmp_path):
        wait_until(lambda: packets_relayed(relay) > 1000, "traffic flows")
        former = template_of(relay)
        former.kill()
        wait_until(lambda: is_published_with_other_template(relay, former.pid), "the next template is known")
        kill_supervisor(relay)
        relay.start_again()
    assert "1 worker replaced" in relay.text()
    assert "no template left" not in relay.text()
    assert "did not answer" not in relay.text()
    relay.stop()


def is_published_with_other_template(relay: Relay, former: int) -> bool:
    return json.loads(relay.socket.with_suffix(".inventory").read_text())["template"]["pid"] not in (0, former)


def test_rings_are_followed_when_their_last_worker_died_without_a_supervisor(
    line: Line, start_relay: StartRelay, tmp_path: Path
) -> None:
    gen, host, sink = line.hosts
    relay = start_relay(host, ("left",), 1, *ROOM)
    add_to_lasting(relay)
    relay_some(line, tmp_path, FEW)
    wait_until(lambda: is_published(relay), "the next one could take over")
    (victim,) = workers(relay)
    kill_supervisor(relay)
    with receiver(sink, tmp_path, "--interface", "left") as received:
        os.kill(victim, signal.SIGSTOP)  # so that no datagram is between ring and socket when it dies
        send(gen, "--interface", "right", "--rate", "20000", "--count", str(FEW))
        os.kill(victim, signal.SIGKILL)
        relay.start_again()
        assert_perfect(received.drain(FEW), FEW)
    assert "0 workers replaced" in relay.text()
    relay.stop()


def test_a_restart_waits_until_workers_could_be_taken_over(line: Line, start_relay: StartRelay, tmp_path: Path) -> None:
    """Asked for while the next template loads. No worker has a warning for it."""
    relay = start_relay(line.hosts[1], ("left",), 1, *ROOM)
    add_to_lasting(relay)
    with relayed_whole(line, tmp_path):
        wait_until(lambda: packets_relayed(relay) > 1000, "traffic flows")
        template_of(relay).kill()
        result = relay.control("restart")
        assert (result.returncode, result.stderr) == (0, "")
    assert "no template left" not in relay.text()
    assert "[Notice] [DataPlane] The supervisor starts anew: relaying goes on" in relay.text()
    assert "The supervisor is gone" not in relay.text()
    relay.stop()


def test_after_a_power_cut_rules_are_back(line: Line, start_relay: StartRelay, tmp_path: Path) -> None:
    relay = start_relay(line.hosts[1], ("left",), 1, *ROOM)
    add_to_lasting(relay)
    former = {child.pid for child in psutil.Process(relay.pid).children(recursive=True)}
    relay.kill_family()
    relay.start_again()
    relay.wait_for_log("[Notice] [Supervisor] Removed 7 segments of a killed supervisor")
    relay.wait_for_log(f"1 rule of {relay.socket.with_suffix('.state')} goes on")
    assert not any(is_alive(pid) for pid in former)
    assert [rule["rule_id"] for rule in relay.ask("list-rules")] == ["r"]
    relay_some(line, tmp_path, 1000)
    relay.stop()


def test_a_take_over_that_is_killed_leaves_nothing_unsupervised(
    line: Line, start_relay: StartRelay, tmp_path: Path
) -> None:
    """What is lost is what came while nobody relayed, less what a ring holds; `pytest -s` tells how much."""
    gen, host, sink = line.hosts
    relay = start_relay(host, ("left",), 1, *ROOM)
    add_to_lasting(relay)
    seen = workers(relay)
    to = ("--interface", "right", "--rate", str(PPS))
    with receiver(sink, tmp_path, "--interface", "left") as received, sender(gen, tmp_path, *to) as sent:
        for text in ("segments of a killed supervisor", "Spawning Data Plane worker", "Data plane worker started"):
            kill_supervisor(relay)
            before = relay.text().count(text)
            relay.process = relay.launch(relay.options)
            wait_until(partial(says_again, relay, text, before), text)
            seen |= {child.pid for child in psutil.Process(relay.pid).children(recursive=True)}
        kill_supervisor(relay)
        relay.process = relay.launch(relay.options)
        wait_until(lambda: relay.control("ping").returncode == 0, "the last one serves")
        wait_until(lambda: relay.ask("list-workers")[0]["state"] == "running", "its worker runs")
        family = {child.pid for child in psutil.Process(relay.pid).children(recursive=True)}
        wait_until(lambda: not any(is_alive(pid) for pid in seen - family), "nothing of the former is left")
        count = sent.interrupt()["datagrams"]
        found = received.drain()
    print(f"killed in the middle of three take-overs: {found['lost']} of {count} lost")
    assert (found["duplicated"], found["reordered"], found["corrupt"]) == (0, 0, 0)
    relay_some(line, tmp_path, 1000)
    relay.stop()


def test_of_two_that_would_take_over_one_does(line: Line, start_relay: StartRelay) -> None:
    relay = start_relay(line.hosts[1], ("left",), 1, *ROOM)
    add_to_lasting(relay)
    kill_supervisor(relay)
    served = relay.text().count("Control plane worker started")
    both = [relay.launch(relay.options), relay.launch(relay.options)]
    wait_until(lambda: any(process.poll() is not None for process in both), "one is refused")
    wait_until(lambda: relay.text().count("Control plane worker started") > served, "the other serves")
    (relay.process,) = [process for process in both if process.poll() is None]
    wait_until(lambda: relay.control("ping").returncode == 0, "it answers")
    assert [rule["rule_id"] for rule in relay.ask("list-rules")] == ["r"]
    relay.stop()


def test_descriptors_are_for_the_supervisors_user_alone(line: Line, start_relay: StartRelay) -> None:
    relay = start_relay(line.hosts[1], ("left",), 1, *ROOM)
    add_to_lasting(relay)
    kill_supervisor(relay)
    handover = relay.socket.with_suffix(".handover")
    handover.chmod(0o666)  # even then
    code = (
        "import os, socket, sys; os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534);"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.connect(sys.argv[1]); print(len(s.recv(100)))"
    )
    for folder in itertools.takewhile(lambda path: path != Path("/"), handover.parents):
        folder.chmod(folder.stat().st_mode | 0o011) if folder.owner() == "root" else None
    result = line.hosts[1].run([PYTHON, "-c", code, str(handover)], capture_output=True)
    assert result.stdout == "0\n", result.stderr
    relay.start_again()
    relay.stop()


def rule_ids(path: Path) -> list[str]:
    return [rule["rule_id"] for rule in json.loads(path.read_text())["rules"]]


def test_a_state_file_keeps_rules_over_a_stop(line: Line, start_relay: StartRelay, tmp_path: Path) -> None:
    state, config = tmp_path / "rules.state", tmp_path / "relay.toml"
    rules = (
        '[[rules]]\nrule_id = "{}"\ninput_group = "239.1.9.9"\ninput_port = 5001\noutputs = ["239.2.9.9:6001:right"]\n'
    )
    config.write_text(rules.format("configured"))
    relay = start_relay(line.hosts[1], ("left",), 1, "--state", str(state), "--config", str(config))
    add_to_lasting(relay)
    relay.stop()
    assert state.stat().st_mode & 0o777 == 0o600
    assert rule_ids(state) == ["configured", "r"]
    config.write_text(rules.format("another"))
    relay.start_again()
    wait_until(lambda: {r["rule_id"] for r in relay.ask("list-rules")} == {"another", "r"}, "both rules")
    relay.stop()


def test_a_damaged_or_half_written_state_is_said_and_stops_nothing(
    line: Line, start_relay: StartRelay, tmp_path: Path
) -> None:
    state = tmp_path / "rules.state"
    state.write_text('{"version": 1, "rules": [')
    (tmp_path / "rules.state.unfinished").write_text('{"ver')
    relay = start_relay(line.hosts[1], ("left",), 1, "--state", str(state))
    assert f"Removed the half-written {state}.unfinished" in relay.text()
    assert f"State file {state} is damaged and was set aside" in relay.text()
    assert (tmp_path / "rules.state.damaged").exists()
    add_to_lasting(relay)
    relay.stop()
    assert rule_ids(state) == ["r"]


def test_a_state_file_that_can_not_be_written_is_refused(line: Line, start_relay: StartRelay, tmp_path: Path) -> None:
    relay = start_relay(line.hosts[1], ("left",), 1, *ROOM)
    relay.stop()
    command = [str(BIN / "mcrd"), *relay.options, "--instance", relay.instance, "--state", str(tmp_path / "no" / "x")]
    result = line.hosts[1].run(command, capture_output=True)
    assert result.returncode == 1
    assert "No such file or directory: give --state a file in an existing directory" in result.stderr
    assert relay.leftovers() == []


def test_a_state_file_is_never_half_written(line: Line, start_relay: StartRelay, tmp_path: Path) -> None:
    state = tmp_path / "rules.state"
    relay = start_relay(line.hosts[1], ("left",), 1, "--state", str(state))
    for turn in range(KILLS):
        stop = threading.Event()
        adding = threading.Thread(target=add_until, args=(relay, turn, stop))
        adding.start()
        wait_until(partial(has_rule, state, f"t{turn}-5"), "some rules")
        relay.process.kill()
        relay.process.wait()
        stop.set()
        adding.join()
        known = rule_ids(state)
        relay.start_again()
        assert [rule["rule_id"] for rule in relay.ask("list-rules")] == known
        assert "is damaged" not in relay.text()
    relay.stop()


def has_rule(state: Path, rule_id: str) -> bool:
    return state.exists() and rule_id in rule_ids(state)


def add_until(relay: Relay, turn: int, stop: threading.Event) -> None:
    with contextlib.suppress(OSError, AssertionError), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(relay.socket))
        stream = client.makefile("rwb")
        for number in itertools.count():
            if stop.is_set():
                return
            output = {"group": "239.2.2.2", "port": 6001, "interface": "right"}
            rule: dict[str, object] = {"rule_id": f"t{turn}-{number}"}
            rule |= {"input_group": f"239.1.{turn}.{number % 250 + 1}"}
            rule |= {"input_port": 5000 + number // 250, "outputs": [output]}
            stream.write(json.dumps({"type": "add-rules", "rules": [rule]}).encode() + b"\n")
            stream.flush()
            if not stream.readline():
                return
