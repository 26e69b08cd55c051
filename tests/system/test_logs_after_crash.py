"""Logs after crashes: killed workers and supervisors lose no record, and what is left is judged before it is removed.

gen ──left── relay ──right── sink
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from logging_shm import SharedSPSCRingBuffer
from logging_shm.layout import RECORD, RECORD_BYTES, RECORDS_OFFSET, STATE_WRITING
from tests.logging_shm.command import Running, mcrlog, mcrlog_json, new_instance
from tests.logging_shm.remnants import FOREIGN, REMNANTS, SHM, clear, private, waiting
from tests.system.conftest import StartRelay
from tests.system.harness import BIN, Relay, send, wait_until
from tools.netns import Line


@pytest.fixture
def instance() -> Iterator[str]:
    """A name of one's own; whatever a test left under it is removed."""
    instance = new_instance()
    yield instance
    for path in SHM.glob(f"mcr_{instance}_*"):
        clear(path.name)


def mcrd(instance: str, *options: str) -> list[str]:
    return [str(BIN / "mcrd"), "--interface", "left", "--instance", instance, "--socket", f"/tmp/{instance}", *options]


def start_again(start_relay: StartRelay, former: Relay) -> Relay:
    """A relay that has the former one's name."""
    relay = start_relay(former.host, ("left",), 1, "--instance", former.instance)
    relay.instance = former.instance
    return relay


LAST_WORDS = "The supervisor is gone: relaying goes on under the rules that it left"


def kill_supervisor(relay: Relay) -> None:
    """Kill -9, wait until the others have said that they know, then end those that go on."""
    family = psutil.Process(relay.pid).children(recursive=True)
    (control_plane,) = [process for process in family if "relay.controlplane" in process.cmdline()]
    relay.process.kill()
    relay.process.wait()
    psutil.wait_procs([control_plane], timeout=10)
    wait_until(lambda: any(LAST_WORDS in line for line in records(relay.instance)), "the worker's last words")
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    gone, alive = psutil.wait_procs(family, timeout=10)
    assert alive == [], gone


def records(instance: str) -> list[str]:
    """The messages that its rings hold."""
    result = mcrlog("dump", "--instance", instance)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_what_a_worker_wrote_before_it_was_killed_is_all_logged(line: Line, start_relay: StartRelay) -> None:
    gen, host, _ = line.hosts
    relay = start_relay(host)
    relay.add("r1", "239.1.1.1:5001", "239.2.2.2:6001:right")
    (worker,) = relay.ask("list-workers")
    relay.process.send_signal(signal.SIGSTOP)  # so that nobody drains
    send(gen, "--interface", "right", "--rate", "100", "--count", "1")
    wait_until(lambda: any("First packet of rule r1" in text for text in records(relay.instance)), "record written")
    assert "First packet" not in relay.text()
    os.kill(worker["pid"], signal.SIGKILL)
    relay.process.send_signal(signal.SIGCONT)
    relay.wait_for_log(f"pid {worker['pid']}, signal SIGKILL")
    relay.wait_for_log("[Info] [Ingress] First packet of rule r1 from ")
    relay.stop()


def test_a_worker_killed_inside_a_record_costs_that_record_and_its_successor_goes_on(
    line: Line, start_relay: StartRelay
) -> None:
    relay = start_relay(line.hosts[1])
    (worker,) = relay.ask("list-workers")
    started = f"[Info] [DataPlane] Data plane worker started on core {worker['core']}"
    ring = SharedSPSCRingBuffer.attach(f"mcr_{relay.instance}_dp_c{worker['core']}_dataplane")
    os.kill(worker["pid"], signal.SIGSTOP)
    place = ring.segment.get("write_cursor") & (ring.capacity - 1)
    record = memoryview(ring.segment.memory)[RECORDS_OFFSET + place * RECORD_BYTES :]
    RECORD.set(record, "state", STATE_WRITING)
    os.kill(worker["pid"], signal.SIGKILL)
    relay.wait_for_log(
        f"[Warning] [DataPlane] A writer of {ring.segment.name} was killed in the middle of a record, which is lost"
    )
    wait_until(lambda: relay.text().count(started) == 2, "successor logs")
    relay.stop()


def test_the_next_supervisor_rescues_what_a_killed_ones_workers_wrote_to_the_end(
    line: Line, start_relay: StartRelay
) -> None:
    former = start_relay(line.hosts[1])
    kill_supervisor(former)
    rings = mcrlog_json("list", "--instance", former.instance)
    unread = sum(ring["unread"] for ring in rings)
    assert {ring["owner"] for ring in rings} == {None}
    assert unread >= 2
    relay = start_again(start_relay, former)
    relay.wait_for_log(f"[Notice] [Supervisor] Removed 7 segments of a killed supervisor, {unread} records rescued")
    log = relay.stop()
    for last_words in (
        f"[Warning] [DataPlane] {LAST_WORDS}",
        "[Info] [ControlPlane] Supervisor stream closed",
    ):
        assert last_words not in former.text()
        assert log.splitlines().index(last_words) < log.splitlines().index("[Info] [Supervisor] Shutting down...")


def test_a_follower_goes_on_over_a_stop_and_a_start(line: Line, start_relay: StartRelay, tmp_path: Path) -> None:
    former = start_relay(line.hosts[1])
    with Running(tmp_path, "tail", "-f", "-n", "1000", "--instance", former.instance) as follower:
        follower.wait_for("Starting MCR supervisor")
        former.stop()
        follower.wait_for("Shutting down...")
        relay = start_again(start_relay, former)
        wait_until(lambda: follower.text().count("Starting MCR supervisor") == 2, "the second relay's first line")
        wait_until(lambda: follower.text().count("Data plane worker started") == 2, "the second relay's worker")
        relay.stop()
        wait_until(lambda: follower.text().count("Shutting down...") == 2, "the second relay's last line")
        assert follower.interrupt() == 0


def test_clean_touches_nothing_of_a_running_relay_and_removes_a_dead_one(line: Line, start_relay: StartRelay) -> None:
    relay = start_relay(line.hosts[1])
    outcome = mcrlog_json("clean", "--instance", relay.instance)
    assert (len(outcome["kept"]), outcome["removed"], outcome["left_alone"]) == (7, {}, [])
    relay.ask("ping")
    kill_supervisor(relay)
    outcome = mcrlog_json("clean", "--instance", relay.instance)
    assert (outcome["kept"], len(outcome["removed"]), outcome["left_alone"]) == ({}, 7, [])
    assert list(SHM.glob(f"mcr_{relay.instance}_*")) == []


@pytest.mark.parametrize("kind", ["text", "wrong mode", "symlink", "directory", "empty but readable"])
def test_a_start_is_refused_where_a_foreign_file_has_a_name_and_the_file_stays(
    line: Line, instance: str, kind: str
) -> None:
    name = f"mcr_{instance}_controlplane"
    FOREIGN[kind](name)
    before = (SHM / name).lstat()
    result = line.hosts[1].run(mcrd(instance), capture_output=True)
    assert result.returncode == 1
    assert result.stderr.startswith(f"mcrd: /dev/shm/{name}")
    assert result.stderr.endswith(": remove it, or choose another --instance\n")
    assert len(result.stderr.splitlines()) == 1
    after = (SHM / name).lstat()
    assert (after.st_ino, after.st_mtime_ns, after.st_size) == (before.st_ino, before.st_mtime_ns, before.st_size)
    assert [path.name for path in SHM.glob(f"mcr_{instance}_*")] == [name]


def run_until_started(line: Line, instance: str, log: Path) -> None:
    with log.open("w") as out, line.hosts[1].popen(mcrd(instance), stdout=out, stderr=subprocess.STDOUT) as process:
        wait_until(lambda: "worker started on core" in log.read_text() or process.poll() is not None, "start")
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0, log.read_text()


def test_half_made_and_damaged_segments_do_not_keep_a_relay_from_starting(
    line: Line, instance: str, tmp_path: Path
) -> None:
    core = Relay.cores(1)[0]
    roles = [
        "supervisor",
        "controlplane",
        *(f"dp_c{core}_{x}" for x in ("dataplane", "ingress", "egress", "bufferpool")),
    ]
    kinds = ["empty", "allocated only", "another version", "truncated", "damaged", "truncated inside the header"]
    for role, kind in zip(roles, kinds, strict=True):
        REMNANTS[kind](f"mcr_{instance}_{role}")
    private(f"mcr_{instance}_dp_c{core}_stats")
    run_until_started(line, instance, tmp_path / "log")
    assert "Removed 7 segments of a killed supervisor, 0 records rescued" in (tmp_path / "log").read_text()
    assert list(SHM.glob(f"mcr_{instance}_*")) == []


def test_a_reused_pid_does_not_keep_a_relay_from_starting(line: Line, instance: str, tmp_path: Path) -> None:
    from logging_shm import SupervisorLogging

    segment = SupervisorLogging(instance).rings.popitem()[1].segment
    for owner in ("process_start_ticks", "creator_start_ticks"):
        segment.set(owner, segment.get(owner) - 1)
    run_until_started(line, instance, tmp_path / "log")
    assert "Removed 1 segment of a killed supervisor" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("role", ["supervisor", "dp_c9_stats"])
def test_a_start_is_refused_while_a_process_uses_what_can_not_be_read(line: Line, instance: str, role: str) -> None:
    make: Callable[[str], Any] = private if role.endswith("stats") else REMNANTS["another version"]
    name = f"mcr_{instance}_{role}"
    make(name)
    with waiting(lambda: os.open(SHM / name, os.O_RDONLY)) as pid:
        result = line.hosts[1].run(mcrd(instance), capture_output=True)
    assert result.returncode == 1
    assert result.stderr == f"mcrd: process {pid} uses /dev/shm/{name}: stop it, or choose another --instance\n"
    assert (SHM / name).exists()


def test_of_two_relays_started_at_once_over_a_dead_ones_segments_one_runs(
    line: Line, start_relay: StartRelay, tmp_path: Path
) -> None:
    former = start_relay(line.hosts[1])
    kill_supervisor(former)
    logs = [tmp_path / "first", tmp_path / "second"]
    processes = []
    for log in logs:
        with log.open("w") as out:
            command = mcrd(former.instance, "--socket", f"{log}.sock")
            processes.append(line.hosts[1].popen(command, stdout=out, stderr=subprocess.STDOUT))
    try:
        wait_until(lambda: any(process.poll() is not None for process in processes), "one is refused")
        refused = 0 if processes[0].poll() is not None else 1
        assert processes[refused].wait() == 1
        assert len(logs[refused].read_text().splitlines()) == 1, logs[refused].read_text()
        wait_until(lambda: "worker started on core" in logs[1 - refused].read_text(), "the other runs")
        processes[1 - refused].send_signal(signal.SIGTERM)
        assert processes[1 - refused].wait(10) == 0
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert list(SHM.glob(f"mcr_{former.instance}_*")) == []


@pytest.mark.parametrize("size", ["64k", "7m"])
def test_where_dev_shm_has_no_room_a_start_is_refused_in_one_line(line: Line, instance: str, size: str) -> None:
    script = f'mount -t tmpfs -o size={size} none /dev/shm && "$@"; code=$?; ls /dev/shm; exit $code'
    command = ["unshare", "--mount", "sh", "-c", script, "sh", *mcrd(instance)]
    result = line.hosts[1].run(command, capture_output=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert "make room in /dev/shm" in result.stderr
    assert len(result.stderr.splitlines()) == 1
