"""The relay's log under traffic and faults: nothing of it is lost unsaid, and nothing of it delays a packet.

gen ──left── relay ──right── sink
"""

import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.system.conftest import StartRelay
from tests.system.harness import BIN, assert_perfect, receiving, send, wait_until
from tools.netns import Line

DATAGRAMS = 20_000
TRACED = 2000  # by strace, which makes a worker many times slower
RULE = ("r1", "239.1.1.1:5001", "239.2.2.2:6001:right")
ROOMY = ("--ring-mib", "64")
# What a worker's loop asks of the kernel: to send, to wait, to take a nap, to fetch what did not fit a slot.
SYSTEM_CALLS = {"io_uring_enter", "poll", "clock_nanosleep", "recvmmsg", "restart_syscall"}
SINGLY = ("--interface", "right", "--no-gso")


def assert_relays(line: Line, folder: Path, count: int = DATAGRAMS) -> None:
    """Everything that is sent arrives."""
    with receiving(line.hosts[2], folder, "--interface", "left") as summary:
        send(line.hosts[0], *SINGLY, "--rate", "20000", "--count", str(count))
        assert_perfect(summary(count), count)


def traced(text: str) -> tuple[int, int]:
    """How many datagrams the Debug records of Ingress and of Egress tell of."""
    received = re.findall(r"\[Debug\] \[Ingress\] Received (\d+) datagrams", text)
    sent = re.findall(r"\[Debug\] \[Egress\] Sent (\d+) datagrams", text)
    return sum(map(int, received)), sum(map(int, sent))


@contextmanager
def system_calls(pid: int, folder: Path) -> Iterator[set[str]]:
    """The names of the system calls that a process makes in the block, filled in at its end."""
    names: set[str] = set()
    table, messages = folder / "strace", folder / "strace-messages"
    with messages.open("w") as out:
        strace = subprocess.Popen(["strace", "-c", "-o", str(table), "-p", str(pid)], stderr=out)
        wait_until(lambda: "attached" in messages.read_text(), "strace is attached")
        yield names
        strace.send_signal(signal.SIGINT)
        strace.wait(10)
    names |= set(re.findall(r"^ *[\d.]+ +[\d.]+ +\d+ +\d+ +\d* *(\w+)$", table.read_text(), re.MULTILINE)) - {"total"}


def test_a_record_costs_no_system_call_and_every_packet_is_traced(
    line: Line, start_relay: StartRelay, tmp_path: Path
) -> None:
    relay = start_relay(line.hosts[1], ("left",), 1, "--log-level", "debug", *ROOMY)
    relay.add(*RULE)
    (worker,) = relay.ask("list-workers")
    with system_calls(worker["pid"], tmp_path) as names:
        assert_relays(line, tmp_path, TRACED)
    assert "io_uring_enter" in names
    assert names <= SYSTEM_CALLS
    text = relay.stop()
    assert traced(text) == (TRACED, TRACED)
    assert "records dropped" not in text


def test_levels_outlive_the_worker_they_were_set_for(line: Line, start_relay: StartRelay, tmp_path: Path) -> None:
    relay = start_relay(line.hosts[1], ("left",), 1, *ROOMY)
    relay.add(*RULE)
    core = relay.cores(1)[0]
    relay.ask("log-level", "set", "debug", "--facility", "ingress", "--core", str(core))
    (worker,) = relay.ask("list-workers")
    os.kill(worker["pid"], signal.SIGKILL)
    relay.wait_for_log("signal SIGKILL")
    wait_until(lambda: relay.ask("list-workers")[0]["state"] == "running", "the next worker runs")
    assert_relays(line, tmp_path, 1000)
    levels = relay.ask("log-level", "get")
    debug = [name for name, level in levels.items() if level == "debug"]
    assert debug == [f"mcr_{relay.instance}_dp_c{core}_ingress"]
    assert traced(relay.stop()) == (1000, 0)


def test_a_log_file_is_opened_anew_on_sighup_and_no_line_is_lost(
    line: Line, start_relay: StartRelay, tmp_path: Path
) -> None:
    log, moved = tmp_path / "mcr.log", tmp_path / "mcr.log.old"
    relay = start_relay(line.hosts[1], ("left",), 1, "--log-to", f"file:{log}", "--log-to", "stdout:")
    relay.ask("ping")
    log.rename(moved)
    relay.process.send_signal(signal.SIGHUP)
    wait_until(log.exists, "the file is there again")
    relay.add("anew", "239.1.1.1:5001", "239.2.2.2:6001:right")
    whole = relay.stop()
    assert "Received command ping" in moved.read_text()
    assert "Received command add-rules" in log.read_text()
    assert moved.read_text() + log.read_text() == whole


def test_a_full_disk_stops_no_packet_and_is_told_when_it_is_over(
    line: Line, start_relay: StartRelay, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "mcr-test", str(disk)], check=True)
    try:
        filler = disk / "filler"
        filler.write_bytes(bytes(200_000))
        sinks = ("--log-to", f"file:{disk / 'mcr.log'}", "--log-to", "stdout:?level=info")
        relay = start_relay(line.hosts[1], ("left",), 1, "--log-level", "debug", *sinks, *ROOMY)
        relay.add(*RULE)
        assert_relays(line, tmp_path, 2000)
        relay.wait_for_log("disk/mcr.log: No space left on device: lines wait, then are lost")
        relay.ask("log-level", "set", "info")
        filler.unlink()
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        relay.wait_for_log("disk/mcr.log works again after")
        relay.stop()
        written = (disk / "mcr.log").read_text()
        assert traced(written) == (2000, 2000)
        assert written.endswith("\n")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("url", ["syslog+tcp://127.0.0.1:9", "syslog+udp://127.0.0.1:9", "journald:/nowhere/socket"])
def test_a_sink_without_anybody_at_its_end_is_told_and_stops_no_packet(
    line: Line, start_relay: StartRelay, tmp_path: Path, url: str
) -> None:
    relay = start_relay(line.hosts[1], ("left",), 1, "--log-to", url, "--log-to", "stdout:", *ROOMY)
    relay.add(*RULE)
    assert_relays(line, tmp_path, 5000)
    relay.wait_for_log("[Error] [Supervisor] Log sink ")
    relay.stop()


def test_a_stopped_reader_of_the_log_stops_no_packet(line: Line, tmp_path: Path) -> None:
    log, control = tmp_path / "mcr.log", tmp_path / "control.sock"
    instance = f"stopped{os.getpid()}"
    command = [str(BIN / "mcrd"), "--interface", "left", "--instance", instance, "--socket", str(control)]
    command += ["--log-level", "debug", "--log-to", "stdout:", "--log-to", f"file:{log}", *ROOMY]
    with line.hosts[1].popen(command, stdout=subprocess.PIPE) as relay:
        try:
            wait_until(lambda: log.exists() and "Data plane worker started" in log.read_text(), "the relay runs")
            add = ["add-rule", "--input-group", "239.1.1.1", "--input-port", "5001", "--output", RULE[2]]
            client = [str(BIN / "mcrctl"), "--socket", str(control), *add]
            assert line.hosts[1].run(client, capture_output=True).returncode == 0
            assert_relays(line, tmp_path)  # twice as many lines as a pipe holds, and nobody reads it
            wait_until(lambda: traced(log.read_text()) == (DATAGRAMS, DATAGRAMS), "every packet is in the file")
            relay.send_signal(signal.SIGINT)
            assert relay.wait(10) == 0
        finally:
            if relay.poll() is None:
                relay.kill()


@contextmanager
def logging_to(line: Line, folder: Path, *prefix: str, stdout: int | None = None) -> Iterator["subprocess.Popen[str]"]:
    """A relay that logs to its standard output and to a file, with RULE; stopped at the end."""
    log, control = folder / "mcr.log", folder / "control.sock"
    command = [*prefix, str(BIN / "mcrd"), "--interface", "left", "--instance", f"logs{os.getpid()}", *ROOMY]
    command += ["--socket", str(control), "--log-level", "debug", "--log-to", "stdout:", "--log-to", f"file:{log}"]
    with line.hosts[1].popen(command, stdout=stdout, stdin=subprocess.DEVNULL) as relay:
        try:
            wait_until(lambda: log.exists() and "Data plane worker started" in log.read_text(), "the relay runs")
            add = ["add-rule", "--input-group", "239.1.1.1", "--input-port", "5001", "--output", RULE[2]]
            client = [str(BIN / "mcrctl"), "--socket", str(control), *add]
            assert line.hosts[1].run(client, capture_output=True).returncode == 0
            yield relay
            relay.send_signal(signal.SIGINT)
            assert relay.wait(10) == 0
        finally:
            if relay.poll() is None:
                relay.kill()


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_without_a_standard_output_everything_else_works(line: Line, tmp_path: Path, closed: str) -> None:
    with logging_to(line, tmp_path, "sh", "-c", f'exec "$@" {closed}', "sh") as relay:
        assert_relays(line, tmp_path, 5000)
        family = [relay.pid, *(child.pid for child in psutil.Process(relay.pid).children(recursive=True))]
        standard = {Path(f"/proc/{pid}/fd/1").readlink() for pid in family}
        assert standard == {Path("/dev/null")}  # no socket or file has that number
    log = (tmp_path / "mcr.log").read_text()
    assert "standard output is closed" in log
    assert traced(log) == (5000, 5000)


def test_a_reader_of_the_log_that_has_gone_stops_no_packet(line: Line, tmp_path: Path) -> None:
    with logging_to(line, tmp_path, stdout=subprocess.PIPE) as relay:
        assert relay.stdout is not None
        relay.stdout.close()
        assert_relays(line, tmp_path, 5000)
        log = tmp_path / "mcr.log"
        wait_until(lambda: "Log sink stdout: Broken pipe" in log.read_text(), "it is told")
    assert traced(log.read_text()) == (5000, 5000)


def test_a_flood_of_nonsense_becomes_one_line_with_its_number(line: Line, start_relay: StartRelay) -> None:
    relay = start_relay(line.hosts[1])
    flood = 3000
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(relay.socket))
        answers = client.makefile("rb")
        for _ in range(flood // 100):
            client.sendall(b"nonsense\n" * 100)
            for _ in range(100):
                assert b'"ok":false' in answers.readline()
    text = relay.stop()
    told = len(re.findall(r"\[Warning\] \[ControlPlane\] Request refused", text))
    suppressed = sum(map(int, re.findall(r"\[ControlPlane\] (\d+) records suppressed by their rate limit", text)))
    others = len(re.findall(r"\[ControlPlane\] (?:Control plane|Supervisor stream)", text))
    assert suppressed > 0
    assert told + suppressed + others == flood + 2


@pytest.mark.parametrize(
    ("url", "exit_code", "message"),
    [
        (
            "file:relative?rotate_bytes=many",
            2,
            "rotate_bytes 'many': expected a number of bytes such as 500000, 100M or 1G",
        ),
        ("file:/nonexistent/mcr.log", 1, "No such file or directory: choose a path that can be written"),
        ("smoke:signals", 2, "expected one of stdout:, file:"),
        ("stdout:?level=loud", 2, "level 'loud': allowed are emergency"),
    ],
)
def test_a_sink_that_can_not_be_is_refused_at_start(line: Line, url: str, exit_code: int, message: str) -> None:
    command = [str(BIN / "mcrd"), "--interface", "left", "--instance", "refused", "--log-to", url]
    result = line.hosts[1].run(command, capture_output=True)
    assert result.returncode == exit_code
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list(Path("/dev/shm").glob("mcr_refused_*")) == []


def test_lines_have_times_and_fields_where_they_are_asked_for(line: Line, start_relay: StartRelay) -> None:
    relay = start_relay(line.hosts[1], ("left",), 1, "--log-timestamps", "--log-fields")
    core = relay.cores(1)[0]
    (worker,) = relay.ask("list-workers")
    text = relay.stop()
    time = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"
    ids = rf"core={core} pid={worker['pid']} tid={worker['pid']} seq=0"
    assert re.search(
        rf"^{time} \[Info\] \[DataPlane\] Data plane worker started on core {core} {ids}$", text, re.MULTILINE
    )
    spawning = rf"Spawning Data Plane worker for core {core} pid={relay.pid} tid={relay.pid} seq=\d+ core=\"{core}\""
    assert re.search(rf"^{time} \[Info\] \[Supervisor\] {spawning}$", text, re.MULTILINE)
