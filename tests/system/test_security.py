"""A live relay's processes as docs/security.md describes them: under traffic, after changes, replacement and stop.

gen ──left── relay ──right── sink
"""

import os
import pwd
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import psutil
import pytest

from relay.confinement.capabilities import AT_START, SUPERVISOR
from relay.confinement.seccomp import CONTROL_PLANE, TEMPLATE, WORKER
from tests.syscall_filter import allowed_calls
from tests.system.conftest import StartRelay
from tests.system.harness import BIN, PYTHON, Relay, assert_perfect, receiving, send, wait_until
from tests.system.service import UNIT, unit_capabilities
from tools.environment import CHECKOUT
from tools.netns import Line

NOBODY = pwd.getpwnam("nobody").pw_uid
SERVICE_USER = "daemon"
NONE = 0
FILTERED = 2  # SECCOMP_MODE_FILTER
ROLES = {"relay.controlplane": "control plane", "relay.dataplane.template": "template"}
SECURITY = CHECKOUT / "docs" / "security.md"


def mask(capabilities: frozenset[int]) -> int:
    return sum(1 << capability for capability in capabilities)


def status_of(path: Path) -> dict[str, str]:
    """The lines of a process's or a thread's status file."""
    return dict(line.split(":\t", 1) for line in path.read_text().splitlines() if ":\t" in line)


def capabilities(status: dict[str, str]) -> list[int]:
    return [int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd", "CapInh", "CapAmb")]


def children(relay: Relay) -> dict[int, str]:
    """The pid and role of each process below the supervisor."""
    found = {}
    for process in psutil.Process(relay.pid).children(recursive=True):
        module = next(module for module in ROLES if module in process.cmdline())
        is_worker = module == "relay.dataplane.template" and process.ppid() != relay.pid
        found[process.pid] = "worker" if is_worker else ROLES[module]
    return found


def assert_confined(relay: Relay, workers: int = 1) -> None:
    """Every thread of every process has what the table of docs/security.md says, no more."""
    threads = list(Path(f"/proc/{relay.pid}/task").iterdir())
    possible = capabilities(status_of(Path("/proc/self/status")))[2]  # a container may withhold some
    kept, bound = mask(SUPERVISOR) & possible, mask(AT_START) & possible
    assert len(threads) > 1  # the log's
    for thread in threads:
        assert capabilities(status_of(thread / "status")) == [kept, kept, bound, NONE, NONE], thread
    found = children(relay)
    assert sorted(found.values()) == ["control plane", "template", *["worker"] * workers]
    for pid, role in found.items():
        status = status_of(Path(f"/proc/{pid}/status"))
        assert capabilities(status) == [NONE] * 5, role
        assert (status["NoNewPrivs"], status["Seccomp"], status["Threads"]) == ("1", "2", "1"), role
        assert int(status["Seccomp_filters"]) == (2 if role == "worker" else 1), role
        assert status["Uid"].split() == [str(NOBODY)] * 4, role
        assert status["Groups"].split() == [], role
        # What is not dumpable belongs to root in /proc: nobody of the same user reads its memory or environment.
        assert Path(f"/proc/{pid}/environ").stat().st_uid == 0, role
        limits = dict(re.findall(r"^(Max (?:core file size|processes)) +(\w+)", limits_of(pid), re.MULTILINE))
        assert limits["Max core file size"] == "0", role
        assert (limits["Max processes"] == "0") == (role != "template"), role


def limits_of(pid: int) -> str:
    return Path(f"/proc/{pid}/limits").read_text()


def assert_relays(line: Line, folder: Path, count: int = 2000) -> None:
    with receiving(line.hosts[2], folder, "--interface", "left") as summary:
        send(line.hosts[0], "--interface", "right", "--rate", "20000", "--count", str(count))
        assert_perfect(summary(count), count)


def is_replaced(relay: Relay, pid: int) -> bool:
    (worker,) = relay.ask("list-workers")
    return bool(worker["pid"] != pid and worker["state"] == "running")


def test_processes_are_confined_whatever_happens(line: Line, start_relay: StartRelay, tmp_path: Path) -> None:
    relay = start_relay(line.hosts[1], ("left",), 1, "--user", "nobody", "--log-level", "debug", "--ring-mib", "64")
    assert_confined(relay)
    relay.add("r1", "239.1.1.1:5001", "239.2.2.2:6001:right")
    assert_relays(line, tmp_path)
    # Changes of every kind, and what is refused.
    relay.add("r2", "239.1.1.2:5001", "239.2.2.2:6002:right", "10.2.0.2:6003:right", options=["--preserve-source"])
    assert relay.control("remove-rule", "none").returncode == 1
    assert "no interface nowhere: this host has left, lo, right" in relay.control(
        "add-rule", "--input-group", "239.1.1.3", "--input-port", "1", "--output", "239.2.2.2:1:nowhere"
    ).stderr  # fmt: skip
    relay.ask("remove-rule", "r2")
    relay.ask("log-level", "set", "info")
    for question in ("list-rules", "get-stats", "list-workers", "ping"):
        relay.ask(question)
    relay.process.send_signal(signal.SIGHUP)
    relay.wait_for_log("Configuration read again")
    line.hosts[1].ip("link", "set", "right", "mtu", "1400")
    line.hosts[1].ip("link", "set", "left", "down")
    relay.wait_for_log("Interface left is down")
    line.hosts[1].ip("link", "set", "left", "up")
    relay.wait_for_log("Interface left is up")
    line.hosts[1].ip("link", "set", "right", "mtu", "1500")
    assert_confined(relay)
    # Each process replaced.
    (worker,) = relay.ask("list-workers")
    os.kill(worker["pid"], signal.SIGKILL)
    wait_until(partial(is_replaced, relay, worker["pid"]), "another worker runs")
    (plane,) = [pid for pid, role in children(relay).items() if role == "control plane"]
    os.kill(plane, signal.SIGKILL)
    relay.wait_for_log("Control plane process exited unexpectedly: signal SIGKILL")
    wait_until(lambda: relay.control("ping").returncode == 0, "another control plane answers")
    assert_confined(relay)
    assert_relays(line, tmp_path)
    text = relay.stop()
    assert "SIGSYS" not in text
    assert "Traceback" not in text


def test_a_supervisor_that_starts_anew_has_no_more_than_before(
    line: Line, start_relay: StartRelay, tmp_path: Path
) -> None:
    relay = start_relay(line.hosts[1], ("left",), 1, "--user", "nobody", "--ring-mib", "64")
    relay.add("r1", "239.1.1.1:5001", "239.2.2.2:6001:right")
    relay.ask("log-level", "get")
    assert relay.control("restart").returncode == 0
    relay.wait_for_log("Took over from supervisor")
    wait_until(lambda: relay.control("ping").returncode == 0, "the next control plane answers")
    wait_until(lambda: len(children(relay)) == 3, "the former processes are gone")
    assert_confined(relay)
    assert_relays(line, tmp_path)
    assert "SIGSYS" not in relay.stop()


def test_an_end_by_seccomp_is_named(line: Line, start_relay: StartRelay) -> None:
    relay = start_relay(line.hosts[1])
    (worker,) = relay.ask("list-workers")
    os.kill(worker["pid"], signal.SIGSYS)  # what the kernel sends for a denied call; tried in tests/relay
    relay.wait_for_log("signal SIGSYS: a system call that its seccomp filter does not allow")
    wait_until(partial(is_replaced, relay, worker["pid"]), "another worker runs")
    relay.stop()


def test_nobody_reads_or_writes_segments_but_their_user(line: Line, start_relay: StartRelay) -> None:
    relay = start_relay(line.hosts[1], ("left",), 1, "--user", "nobody")
    for path in Path("/dev/shm").glob(f"mcr_{relay.instance}_*"):
        status = path.stat()
        assert status.st_mode & 0o777 == 0o600
        assert status.st_uid == (0 if path.name.endswith("_supervisor") else NOBODY)
    relay.stop()


class Service(Relay):
    """A relay as the unit runs it."""

    def launch(self, options: Sequence[str]) -> "subprocess.Popen[str]":
        command = [PYTHON, "-m", "tests.system.service", SERVICE_USER, str(BIN / "mcrd")]
        command += ["--user", SERVICE_USER, "--socket", str(self.socket), "--instance", self.instance, *options]
        with self.log.open("a") as out:
            return self.host.popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=CHECKOUT)


@pytest.fixture
def service(line: Line) -> Iterator[Service]:
    """A running one, which owns the directory of its socket."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        user = pwd.getpwnam(SERVICE_USER)
        os.chown(folder, user.pw_uid, user.pw_gid)
        service = Service(line.hosts[1], Path(folder), ("left",), 1, "--ring-mib", "64")
        yield service
        service.kill()


def assert_serves_with_little(service: Service) -> None:
    """No process is root's, the supervisor has the unit's three capabilities, its children none that they can use."""
    user = pwd.getpwnam(SERVICE_USER).pw_uid
    unit = mask(frozenset(unit_capabilities()))
    supervisor = status_of(Path(f"/proc/{service.pid}/status"))
    # What is inheritable stays: capset(2) is refused.
    assert capabilities(supervisor) == [unit, unit, unit, unit, NONE]
    assert supervisor["Uid"].split() == [str(user)] * 4
    for pid, role in children(service).items():
        status = status_of(Path(f"/proc/{pid}/status"))
        assert capabilities(status) == [NONE, NONE, unit, unit, NONE], role
        assert (status["NoNewPrivs"], status["Seccomp"], status["Threads"]) == ("1", "2", "1"), role
        assert status["Uid"].split() == [str(user)] * 4, role


def test_a_service_that_is_not_root_relays_recovers_and_starts_anew(
    line: Line, service: Service, tmp_path: Path
) -> None:
    assert_serves_with_little(service)
    service.add("r1", "239.1.1.1:5001", "239.2.2.2:6001:right")
    service.add("r2", "239.1.1.2:700", "10.2.0.2:6003:right", options=["--preserve-source"])
    assert_relays(line, tmp_path)
    (worker,) = service.ask("list-workers")
    os.kill(worker["pid"], signal.SIGKILL)
    wait_until(partial(is_replaced, service, worker["pid"]), "another worker runs")
    service.process.kill()
    service.process.wait()
    service.start_again()
    assert "Took over from supervisor" in service.text()
    assert_serves_with_little(service)
    assert service.control("restart").returncode == 0
    wait_until(lambda: service.text().count("Took over from supervisor") == 2, "the program started anew")
    wait_until(lambda: service.control("ping").returncode == 0, "it serves")
    assert_serves_with_little(service)
    assert_relays(line, tmp_path)
    assert "SIGSYS" not in service.stop()


def test_the_unit_lets_every_call_pass_that_a_process_needs() -> None:
    allowed = allowed_calls(UNIT)
    needed = {*CONTROL_PLANE, *WORKER, *TEMPLATE, "execve", "memfd_create", "pidfd_open", "pidfd_send_signal"}
    assert needed - allowed == set()
    assert {"mount", "setuid", "ptrace", "bpf", "chown", "init_module"} & allowed == set()


def test_the_template_unit_is_the_unit_with_a_name() -> None:
    plain, named = ((UNIT.parent / name).read_text().splitlines() for name in ("mcr.service", "mcr@.service"))
    differ = [(before, after) for before, after in zip(plain, named, strict=True) if before != after]
    assert [after.partition("=")[0] for _, after in differ[1:]] == ["Description", "ExecStart", "StateDirectory"]
    assert all("%i" in after for _, after in differ[1:])


@pytest.mark.parametrize("unit", ["mcr.service", "mcr@.service"])
def test_the_unit_is_valid_and_exposes_little(tmp_path: Path, unit: str) -> None:
    source = (CHECKOUT / "packaging" / "systemd" / unit).read_text()
    copy = tmp_path / unit.replace("@", "@test")
    copy.write_text(re.sub(r"^(ExecStart=)\S+", rf"\g<1>{BIN}/mcrd", source, flags=re.MULTILINE))
    verified = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True, check=False)
    assert (verified.returncode, [line for line in verified.stderr.splitlines() if unit[:3] in line]) == (0, [])
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager", str(copy)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-300:]
