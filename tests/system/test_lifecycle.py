"""Starting, stopping, dying: what the operator reads, and what is left.

gen ──left── relay ──right── sink
"""

import contextlib
import os
import pwd
import signal
import socket
import struct
import subprocess
from functools import partial
from pathlib import Path

import psutil
import pytest

from tests.system.conftest import StartRelay
from tests.system.harness import BIN, Relay, assert_perfect, receiving, relayed_whole, send, wait_until
from tools.netns import Line

RULE = """
[[rules]]
rule_id = "{}"
input_group = "239.1.1.1"
input_port = {}
outputs = ["239.2.2.2:6001:right"]
"""


def in_order(text: str, lines: list[str]) -> bool:
    """Whether these lines stand in `text` in this order, each whole."""
    found = iter(text.splitlines())
    return all(line in found for line in lines)


def test_start_and_end_are_logged_in_the_documented_order(line: Line, start_relay: StartRelay) -> None:
    relay = start_relay(line.hosts[1])
    core = relay.cores(1)[0]
    relay.ask("list-workers")
    relay.ask("ping")
    log = relay.stop()
    expected = [
        "[Info] [Supervisor] Starting MCR supervisor",
        "[Info] [Supervisor] Spawning Control Plane worker",
        f"[Info] [Supervisor] Spawning Data Plane worker for core {core}",
        "[Info] [ControlPlane] Control plane worker started",
        f"[Info] [DataPlane] Data plane worker started on core {core}",
        "[Info] [ControlPlane] Received command ping",
        "[Info] [DataPlane] Supervisor stream closed, sending shutdown to data plane",
        "[Info] [ControlPlane] Supervisor stream closed",
        "[Info] [Supervisor] Shutting down...",
    ]
    assert in_order(log, expected), log
    assert "list-workers" not in log, "what only looks is told at Debug: a screen asks every second"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_leaves_no_process_segment_or_socket(
    line: Line, start_relay: StartRelay, number: signal.Signals
) -> None:
    relay = start_relay(line.hosts[1], ("left",), 2)
    family = psutil.Process(relay.pid).children(recursive=True)
    assert len(family) == 4  # control plane, template, two workers
    relay.process.send_signal(number)
    assert relay.process.wait(10) == 0
    assert [process for process in family if process.is_running()] == []
    assert relay.leftovers() == []


def test_traffic_in_the_rings_is_finished_at_the_end(line: Line, start_relay: StartRelay, tmp_path: Path) -> None:
    gen, host, sink = line.hosts
    relay = start_relay(host, ("left",), 1, "--ring-mib", "64")
    relay.add("r1", "239.1.1.1:5001", "239.2.2.2:6001:right")
    (worker,) = relay.ask("list-workers")
    with receiving(sink, tmp_path, "--interface", "left") as summary:
        os.kill(worker["pid"], signal.SIGSTOP)
        send(gen, "--interface", "right", "--rate", "20000", "--count", "5000")
        relay.process.send_signal(signal.SIGINT)
        with contextlib.suppress(ProcessLookupError):  # killed as hanging, where all that took too long
            os.kill(worker["pid"], signal.SIGCONT)
        assert_perfect(summary(5000), 5000)
    assert relay.process.wait(10) == 0


def test_workers_and_control_plane_run_unprivileged_and_pinned(line: Line, start_relay: StartRelay) -> None:
    relay = start_relay(line.hosts[1], ("left",), 2)
    for process in psutil.Process(relay.pid).children(recursive=True):
        assert process.uids().effective != 0, process.cmdline()
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert "CapEff:\t0000000000000000" in status
    workers = relay.ask("list-workers")
    assert [psutil.Process(worker["pid"]).cpu_affinity() for worker in workers] == [[core] for core in relay.cores(2)]


def test_a_killed_worker_is_replaced_and_nothing_waiting_is_lost(
    line: Line, start_relay: StartRelay, tmp_path: Path
) -> None:
    gen, host, sink = line.hosts
    relay = start_relay(host, ("left",), 1, "--ring-mib", "64")
    relay.add("r1", "239.1.1.1:5001", "239.2.2.2:6001:right")
    (worker,) = relay.ask("list-workers")
    with receiving(sink, tmp_path, "--interface", "left") as summary:
        os.kill(worker["pid"], signal.SIGSTOP)  # so that no datagram is between ring and socket when it dies
        send(gen, "--interface", "right", "--rate", "20000", "--count", "3000")
        with contextlib.suppress(ProcessLookupError):  # killed as hanging, where all that took too long
            os.kill(worker["pid"], signal.SIGKILL)
        assert_perfect(summary(3000), 3000)
    relay.wait_for_log(
        f"[Critical] [Supervisor] Worker process exited unexpectedly: core {worker['core']}, "
        f"pid {worker['pid']}, signal SIGKILL"
    )
    assert relay.assert_accounted()["packets_relayed"] == 3000
    relay.stop()


def has_relayed(relay: Relay, packets: int) -> bool:
    return bool(relay.stats()["packets_relayed"] >= packets)


def test_workers_killed_under_traffic_lose_and_double_nothing(
    line: Line, start_relay: StartRelay, tmp_path: Path
) -> None:
    relay = start_relay(line.hosts[1], ("left",), 1, "--ring-mib", "64")
    relay.add("r1", "239.1.1.1:5001", "239.2.2.2:6001:right")
    with relayed_whole(line, tmp_path, "--rate", "10000"):
        for _ in range(3):
            before = relay.stats()["packets_relayed"]
            wait_until(partial(has_relayed, relay, before + 5000), "traffic flows")
            (worker,) = relay.ask("list-workers")
            os.kill(worker["pid"], signal.SIGKILL)
            relay.wait_for_log(f"pid {worker['pid']}, signal SIGKILL")
    relay.stop()


@pytest.mark.parametrize("module", ["relay.controlplane", "relay.dataplane.template"])
def test_a_killed_helper_is_replaced_and_rules_stay(line: Line, start_relay: StartRelay, module: str) -> None:
    relay = start_relay(line.hosts[1])
    relay.add("r1", "239.1.1.1:5001", "239.2.2.2:6001:right")
    children = psutil.Process(relay.pid).children()
    (victim,) = [process for process in children if module in process.cmdline()]
    victim.kill()
    relay.wait_for_log("process exited unexpectedly: signal SIGKILL")
    wait_until(lambda: relay.control("ping").returncode == 0, "control plane answers")
    assert [rule["rule_id"] for rule in relay.ask("list-rules")] == ["r1"]
    wait_until(lambda: relay.ask("list-workers")[0]["state"] == "running", "worker runs")
    relay.stop()


def test_after_a_kill_the_next_start_cleans_up_and_says_so(line: Line, start_relay: StartRelay, tmp_path: Path) -> None:
    host = line.hosts[1]
    first = start_relay(host)
    first.kill_family()
    assert first.leftovers() != []
    log = tmp_path / "second.log"
    command = [str(BIN / "mcrd"), "--interface", "left", "--instance", first.instance, "--socket", str(first.socket)]
    with log.open("w") as out, host.popen(command, stdout=out, stderr=subprocess.STDOUT) as second:
        wait_until(lambda: "Data plane worker started" in log.read_text(), "second relay started")
        second.send_signal(signal.SIGTERM)
        assert second.wait(10) == 0
    assert "[Notice] [Supervisor] Removed 7 segments of a killed supervisor" in log.read_text()
    assert "Removed the control socket" in log.read_text()
    assert first.leftovers() == []


def test_a_second_relay_of_the_same_name_is_refused_and_the_first_goes_on(line: Line, start_relay: StartRelay) -> None:
    host = line.hosts[1]
    relay = start_relay(host)
    command = [str(BIN / "mcrd"), "--interface", "left", "--instance", relay.instance, "--socket", "/tmp/none.sock"]
    result = host.run(command, capture_output=True)
    assert result.returncode == 1
    assert f"process {relay.pid} uses /dev/shm/mcr_{relay.instance}_supervisor" in result.stderr
    relay.ask("ping")
    relay.stop()


def test_two_instances_run_side_by_side(line: Line, start_relay: StartRelay) -> None:
    first, second = start_relay(line.hosts[1]), start_relay(line.hosts[1])
    first.add("r1", "239.1.1.1:5001", "239.2.2.2:6001:right")
    assert second.ask("list-rules") == []
    first.stop()
    second.stop()


def test_sighup_installs_the_configuration_again(line: Line, start_relay: StartRelay, tmp_path: Path) -> None:
    config = tmp_path / "relay.toml"
    config.write_text(RULE.format("kept", 5001) + RULE.format("gone", 5002))
    relay = start_relay(line.hosts[1], ("left",), 1, "--config", str(config))
    wait_until(lambda: len(relay.ask("list-rules")) == 2, "rules of the configuration")
    relay.add("client", "239.1.1.1:5009", "239.2.2.2:6009:right")
    config.write_text(RULE.format("kept", 5001) + RULE.format("new", 5003))
    relay.process.send_signal(signal.SIGHUP)
    wait_until(
        lambda: {rule["rule_id"] for rule in relay.ask("list-rules")} == {"kept", "client", "new"}, "new configuration"
    )
    config.write_text("nonsense = 1\n")
    relay.process.send_signal(signal.SIGHUP)
    relay.wait_for_log(f"Configuration not changed: {config}:1: nonsense: unknown key")
    assert len(relay.ask("list-rules")) == 3
    config.write_text("stats_interval_s = 8\n" + RULE.format("kept", 5001))
    relay.process.send_signal(signal.SIGHUP)
    relay.wait_for_log("Options other than rules have changed: they take effect at the next start")
    relay.stop()


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["--interface", "nowhere"], 1, "no interface nowhere: this host has"),
        (["--interface", "left", "--cores", "999"], 1, "core 999 is not allowed to this process"),
        (["--interface", "left", "--cores", "x"], 2, "expected numbers and ranges such as 2,4-7"),
        (["--interface", "left", "--num-workers", "64"], 1, "64 workers need as many cores"),
        (["--interface", "left", "--user", "nobody-at-all"], 1, "no user 'nobody-at-all'"),
        (["--interface", "left", "--config", "/nonexistent.toml"], 1, "/nonexistent.toml"),
        ([], 2, "no interface: give --interface"),
        (["--interface", "left", "--ring-mib", "-1"], 2, "command line: ring_mib"),
    ],
)
def test_wrong_options_are_refused_with_one_line(
    line: Line, arguments: list[str], exit_code: int, message: str
) -> None:
    result = line.hosts[1].run([str(BIN / "mcrd"), "--instance", "refused", *arguments], capture_output=True)
    assert result.returncode == exit_code
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list(Path("/dev/shm").glob("mcr_refused_*")) == []


def test_without_capabilities_the_remedy_is_named(line: Line) -> None:
    command = ["setpriv", "--bounding-set=-net_raw", "--inh-caps=-net_raw", str(BIN / "mcrd"), "--interface", "left"]
    result = line.hosts[1].run([*command, "--check"], capture_output=True)
    assert result.returncode == 1
    assert "CAP_NET_RAW is missing: start as root" in result.stderr


def test_check_starts_nothing(line: Line, tmp_path: Path) -> None:
    config = tmp_path / "relay.toml"
    config.write_text('interfaces = ["left"]\nnum_workers = 2\n' + RULE.format("r1", 5001))
    command = [str(BIN / "mcrd"), "--config", str(config), "--check", "--instance", "checked"]
    result = line.hosts[1].run(command, capture_output=True)
    assert (result.returncode, result.stdout) == (0, "ok: 1 rule, 2 workers on left\n"), result.stderr
    assert list(Path("/dev/shm").glob("mcr_checked_*")) == []
    nowhere = line.hosts[1].run([*command, "--state", str(tmp_path / "nowhere" / "state")], capture_output=True)
    assert nowhere.returncode == 1
    assert "its directory can't be written to: give --state a file" in nowhere.stderr


def test_garbage_on_the_control_socket_is_answered_and_stops_nothing(line: Line, start_relay: StartRelay) -> None:
    relay = start_relay(line.hosts[1])
    for garbage in (b"\n", b"{}\n", b"\xff\xfe\n", b'{"type":"add-rules","rules":[{}]}\n', struct.pack("<I", 1 << 31)):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(str(relay.socket))
            client.sendall(garbage)
            client.shutdown(socket.SHUT_WR)
            assert b'"ok":false' in client.makefile("rb").read()
    relay.ask("ping")
    relay.stop()


def ask_as(uid: int, path: Path, request: bytes) -> bytes:
    """The answer that another user gets; it reaches the socket from its folder, whoever owns those above."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.chdir(path.parent)
        os.setuid(uid)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(path.name)
            client.sendall(request + b"\n")
            os.write(writer, client.makefile("rb").readline())
        os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    with os.fdopen(reader, "rb") as answer:
        return answer.read()


def test_other_users_may_look_but_not_change(line: Line, start_relay: StartRelay) -> None:
    relay = start_relay(line.hosts[1])
    relay.socket.parent.chmod(0o711)
    stranger = pwd.getpwnam("daemon").pw_uid
    assert b'"ok":true' in ask_as(stranger, relay.socket, b'{"type":"ping"}')
    refused = ask_as(stranger, relay.socket, b'{"type":"remove-rules","rule_ids":["r1"]}')
    assert b"may look but not change anything" in refused
