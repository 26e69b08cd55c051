"""Faults of the host: what it lacks or forbids is told in a line at start, and a relay that runs never notices.

gen ──left── relay ──right── sink        10.1.0.0/24, 10.2.0.0/24
"""

import contextlib
import errno
import os
import signal
import socket
import stat
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from relay import api
from relay.client import Client
from relay.confinement.capabilities import Capability
from relay.dataplane.uring_params import NR_IO_URING_ENTER, NR_IO_URING_REGISTER, NR_IO_URING_SETUP
from relay.errors import ControlError
from relay.rules import Output, Rule
from tests.system.conftest import StartRelay
from tests.system.harness import BIN, PYTHON, Relay, relay_some, relayed_whole, wait_until
from tools.environment import CHECKOUT
from tools.netns import Host, Line

IN, OUT = "239.1.1.1:5001", "239.2.2.2:6001:right"
ROOMY = ("--ring-mib", "64")
UNRAISED = ("setpriv", "--bounding-set=-sys_resource", "--inh-caps=-sys_resource")
SHM_BYTES = 48 << 20
NOBODY = 65534


class Through(Host):
    """A host whose processes are started by a command such as prlimit."""

    def __init__(self, host: Host, *prefix: str) -> None:
        self.namespace = host.namespace
        self.prefix = prefix

    def command(self, arguments: Sequence[str]) -> list[str]:
        return [*self.prefix, *super().command(arguments)]


@contextlib.contextmanager
def mounted(host: Host, script: str) -> Iterator[Through]:
    """The host with mounts of its own, which a shell script makes; nobody else sees them."""
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", f"{script}\necho ready\nexec sleep inf"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "ready\n"
            yield Through(host, "nsenter", "--mount", "--target", str(holder.pid))
        finally:
            holder.kill()


def refused(host: Host, folder: Path, *options: str) -> str:
    """Start an mcrd that is refused: one line, and nothing is left. Returns the line."""
    instance, place = f"refused{os.getpid()}", folder / "refused"
    place.mkdir(exist_ok=True)
    command = [str(BIN / "mcrd"), "--interface", "left", "--instance", instance]
    command += ["--socket", str(place / "control.sock"), *options]
    result = host.run(command, capture_output=True, cwd=CHECKOUT, timeout=60)
    assert result.returncode == 1, result.stdout + result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith("mcrd: ")
    found = host.run(["sh", "-c", f"ls /dev/shm {place}"], capture_output=True)
    assert instance not in found.stdout
    assert list(place.iterdir()) == []
    assert not [p for p in psutil.process_iter() if any(instance in word for word in _words(p))]
    return result.stderr


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@contextlib.contextmanager
def lacking(what: str, host: Host, folder: Path) -> Iterator[Host]:
    """The host with something missing."""
    match what.split():
        case ["sysctl", value]:
            setting = folder / "io_uring_disabled"
            setting.write_text(f"{value}\n")
            with mounted(host, f"mount --bind {setting} /proc/sys/kernel/io_uring_disabled") as there:
                yield there
        case ["seccomp", number, error]:
            yield Through(host, "env", f"PYTHONPATH={CHECKOUT}", PYTHON, "-m", "tests.system.refusing", number, error)
        case ["shm", size]:
            with mounted(host, f"mount -t tmpfs -o size={size} mcr-test /dev/shm") as there:
                yield there
        case ["nofile", limit]:
            yield Through(host, "prlimit", f"--nofile={limit}:{limit}", *UNRAISED)


LACKS = [
    ("sysctl 1", "io_uring is disabled (kernel.io_uring_disabled = 1): run `sysctl kernel.io_uring_disabled=0`"),
    ("sysctl 2", "io_uring is disabled (kernel.io_uring_disabled = 2): run `sysctl kernel.io_uring_disabled=0`"),
    (f"seccomp {NR_IO_URING_SETUP} {errno.EPERM}", "io_uring_setup: Operation not permitted: a seccomp filter"),
    (
        f"seccomp {NR_IO_URING_SETUP} {errno.ENOSYS}",
        "io_uring_setup: Function not implemented: the kernel was built without it",
    ),
    (f"seccomp {NR_IO_URING_SETUP} {errno.ENOMEM}", "io_uring_setup: Cannot allocate memory: raise LimitMEMLOCK="),
    (f"seccomp {NR_IO_URING_REGISTER} {errno.EACCES}", "io_uring_register: Permission denied: a security module"),
    (f"seccomp {NR_IO_URING_ENTER} {errno.EPERM}", "io_uring_enter: Operation not permitted: a seccomp filter"),
    ("nofile 100", "the limit of open files is 100: 170 are needed, and one for each output: raise LimitNOFILE="),
    ("shm 64k", "make room in /dev/shm"),
    ("shm 4m", "make room in /dev/shm"),
    ("shm 8m", "make room in /dev/shm"),
]


@pytest.mark.parametrize(("what", "message"), LACKS)
def test_what_the_host_lacks_is_told_at_start(line: Line, tmp_path: Path, what: str, message: str) -> None:
    with lacking(what, line.hosts[1], tmp_path) as host:
        assert message in refused(host, tmp_path)


def test_starts_that_are_refused_disturb_no_relay(line: Line, start_relay: StartRelay, tmp_path: Path) -> None:
    relay = start_relay(line.hosts[1], ("left",), 1, *ROOMY)
    relay.add("r", IN, OUT)
    with relayed_whole(line, tmp_path):
        for what, message in LACKS:
            with lacking(what, line.hosts[1], tmp_path) as host:
                assert message in refused(host, tmp_path)
    relay.stop()


def test_a_full_dev_shm_stops_no_relay_that_runs(line: Line, start_relay: StartRelay, tmp_path: Path) -> None:
    with mounted(line.hosts[1], f"mount -t tmpfs -o size={SHM_BYTES} mcr-test /dev/shm") as host:
        relay = start_relay(host, ("left",), 1, *ROOMY)
        relay.add("r", IN, OUT)
        with relayed_whole(line, tmp_path):
            host.run(["sh", "-c", "cat /dev/zero > /dev/shm/filler"], stderr=subprocess.DEVNULL)
            assert "make room in /dev/shm" in refused(host, tmp_path)
            relay.add("meanwhile", "239.1.1.9:5009", "239.2.2.9:6009:right")
            (worker,) = relay.ask("list-workers")
            os.kill(worker["pid"], signal.SIGKILL)
            wait_until(lambda: relay.ask("list-workers")[0]["pid"] not in (0, worker["pid"]), "the next worker")
        relay.stop()
        left = host.run(["ls", "/dev/shm"], capture_output=True).stdout
        assert left == "filler\n"


def capabilities() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(text for text in status.splitlines() if text.startswith("CapEff")).split()[1], 16)


def test_the_limit_of_locked_memory_is_raised_by_a_relay_that_may(
    line: Line, start_relay: StartRelay, tmp_path: Path
) -> None:
    if not capabilities() >> Capability.CAP_SYS_RESOURCE & 1:
        pytest.skip("nobody may raise a limit here: CAP_SYS_RESOURCE is missing")
    host = Through(line.hosts[1], "prlimit", "--memlock=0:0")
    relay = start_relay(host, ("left",), 1, *ROOMY)
    relay.add("r", IN, OUT)
    relay_some(line, tmp_path, 20_000)
    relay.stop()


def test_too_little_locked_memory_is_told_where_the_kernel_counts_it(line: Line, tmp_path: Path) -> None:
    """Newer kernels do, 6.18 for one, without CAP_IPC_LOCK; the packet ring never counts."""
    limited = Through(line.hosts[1], "prlimit", "--memlock=0:0", *UNRAISED)
    trial = "from relay.dataplane.uring_params import *; try_io_urings(SQ_ENTRIES, 1)"
    unprivileged = ["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock", PYTHON, "-c", trial]
    if limited.run(unprivileged, capture_output=True, cwd=CHECKOUT).returncode == 0:
        pytest.skip("this kernel does not count an io_uring as locked memory")
    assert "io_uring_setup: Cannot allocate memory: raise LimitMEMLOCK=" in refused(limited, tmp_path)


# --- descriptors ------------------------------------------------------------------------------------------------------


def rule_with(rule_id: str, group: str, outputs: int) -> Rule:
    """A rule whose every output needs a socket."""
    ports = range(1, outputs + 1)
    return Rule(
        rule_id=rule_id,
        input_group=group,
        input_port=5001,
        outputs=tuple(Output("239.3.0.1", port, "right") for port in ports),
    )


def child(relay: Relay, module: str) -> int:
    """The pid of a helper process, 0 while there is none."""
    return next((c.pid for c in psutil.Process(relay.pid).children() if module in " ".join(_words(c))), 0)


def test_outputs_without_descriptors_are_refused_and_nothing_else_changes(
    line: Line, start_relay: StartRelay, tmp_path: Path
) -> None:
    host = Through(line.hosts[1], "prlimit", "--nofile=400:400", *UNRAISED)
    relay = start_relay(host, ("left",), 1, *ROOMY)
    relay.add("r", IN, OUT)
    opened = psutil.Process(relay.pid).num_fds()
    with relayed_whole(line, tmp_path), Client(relay.socket) as client:
        for _ in range(3):  # nothing is used up by being refused
            with pytest.raises(ControlError, match=r"on right: 400 files may be open.*LimitNOFILE="):
                client.ask(api.AddRules((rule_with("thousands", "239.1.2.1", 1000),)))
        assert [rule["rule_id"] for rule in relay.ask("list-rules")] == ["r"]
        assert psutil.Process(relay.pid).num_fds() == opened
        outputs = 0
        with contextlib.suppress(ControlError):
            while outputs < 400:
                client.ask(api.AddRules((rule_with("most", "239.1.2.2", outputs + 10),), replace=True))
                outputs += 10
        assert 100 < outputs < 400
        for module in ("relay.dataplane.template", "relay.controlplane"):  # every process can be replaced all the same
            former = child(relay, module)
            os.kill(former, signal.SIGKILL)
            wait_until(lambda m=module, f=former: child(relay, m) not in (0, f), f"the next {module}")  # type: ignore[misc]
        (worker,) = relay.ask("list-workers")
        os.kill(worker["pid"], signal.SIGKILL)
        wait_until(lambda: relay.ask("list-workers")[0]["pid"] not in (0, worker["pid"]), "the next worker")
    most = next(rule for rule in relay.stats()["rules"] if rule["rule_id"] == "most")
    assert len(most["outputs"]) == outputs
    relay.stop()


# --- two of the same --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stopped(pid: int, is_stopped: bool) -> Iterator[None]:
    """A process that SIGSTOP holds while the block runs, if `is_stopped`."""
    if is_stopped:
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, "it is stopped")
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def files_of(relay: Relay) -> dict[str, tuple[int, bytes]]:
    """What lies beside the control socket: inode and content."""
    found = relay.socket.parent.glob(f"{relay.socket.stem}.*")
    return {
        path.name: (path.lstat().st_ino, path.read_bytes() if path.is_file() and path.suffix != ".log" else b"")
        for path in found
    }


@pytest.mark.parametrize("is_stopped", [False, True])
@pytest.mark.parametrize("same", ["instance", "socket"])
def test_a_second_relay_is_refused_by_the_pid_of_the_first(
    line: Line, start_relay: StartRelay, tmp_path: Path, same: str, is_stopped: bool
) -> None:
    relay, other = start_relay(line.hosts[1]), start_relay(line.hosts[1])
    relay.add("r", IN, OUT)
    place = tmp_path / "second"
    place.mkdir()
    names = {"instance": f"second{os.getpid()}", "socket": str(place / "control.sock")}
    names[same] = relay.instance if same == "instance" else str(relay.socket)
    before = files_of(relay)
    with stopped(relay.pid, is_stopped):
        command = [str(BIN / "mcrd"), "--interface", "left", "--instance", names["instance"]]
        result = line.hosts[1].run([*command, "--socket", names["socket"]], capture_output=True, timeout=60)
    assert result.returncode == 1
    assert f"process {relay.pid} " in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list(Path("/dev/shm").glob(f"mcr_second{os.getpid()}_*")) == []
    assert list(place.iterdir()) == []
    assert files_of(relay) == before
    assert [rule["rule_id"] for rule in relay.ask("list-rules")] == ["r"]
    assert other.ask("list-rules") == []
    relay.stop()
    other.stop()


# --- what lies where mcrd makes files ---------------------------------------------------------------------------------


def foreign_file(folder: Path) -> Path:
    """A file that no relay may change."""
    file = folder / "foreign"
    file.write_text("precious")
    file.chmod(0o640)
    os.chown(file, NOBODY, NOBODY)
    return file


def assert_untouched(file: Path) -> None:
    status = file.lstat()
    assert file.read_text() == "precious"
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o640, NOBODY, NOBODY)


def start_in(host: Host, place: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    """Start an mcrd with its files in `place`, of which a refusal is expected."""
    command = [str(BIN / "mcrd"), "--interface", "left", "--instance", f"placed{os.getpid()}"]
    result = host.run([*command, "--socket", str(place / "control.sock"), *options], capture_output=True, timeout=60)
    assert list(Path("/dev/shm").glob(f"mcr_placed{os.getpid()}_*")) == []
    return result


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        ("sock", "is a symbolic link: remove it"),
        ("handover", "is a symbolic link: remove it"),
        ("handover-next", "is a symbolic link: remove it"),
        ("inventory", "Too many levels of symbolic links: make it readable, or remove it"),
        ("state", "Too many levels of symbolic links: make it readable, or remove it"),
    ],
)
def test_a_link_in_the_place_of_a_file_is_named_and_not_followed(
    line: Line, tmp_path: Path, suffix: str, message: str
) -> None:
    foreign, link = foreign_file(tmp_path), tmp_path / f"control.{suffix}"
    link.symlink_to(foreign)
    result = start_in(line.hosts[1], tmp_path)
    assert result.returncode == 1
    assert f"{link}" in result.stderr
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert link.is_symlink()
    assert_untouched(foreign)


@pytest.mark.parametrize("suffix", ["sock", "handover", "handover-next"])
def test_a_file_in_the_place_of_a_socket_is_named_and_kept(line: Line, tmp_path: Path, suffix: str) -> None:
    file = foreign_file(tmp_path).rename(tmp_path / f"control.{suffix}")
    result = start_in(line.hosts[1], tmp_path)
    assert result.returncode == 1
    assert f"{file} exists and is no socket: remove it" in result.stderr
    assert_untouched(file)


def test_another_users_socket_is_named_and_kept(line: Line, tmp_path: Path) -> None:
    place = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(place))
    os.chown(place, NOBODY, NOBODY)
    result = start_in(line.hosts[1], tmp_path)
    assert result.returncode == 1
    assert f"control socket {place} belongs to nobody: remove it" in result.stderr
    assert place.is_socket()


@pytest.mark.parametrize("suffix", ["state", "inventory"])
def test_a_half_written_link_of_a_killed_relay_is_removed_alone(
    line: Line, start_relay: StartRelay, tmp_path: Path, suffix: str
) -> None:
    foreign = foreign_file(tmp_path)
    name = f"test{os.getpid()}-{Relay.serial + 1}.{suffix}.unfinished"
    (tmp_path / name).symlink_to(foreign)
    relay = start_relay(line.hosts[1])
    relay.add("r", IN, OUT)
    relay.stop()
    assert not (tmp_path / name).is_symlink()
    assert_untouched(foreign)


@pytest.mark.parametrize(
    ("owner", "mode", "message"),
    [
        (NOBODY, 0o755, "belongs to nobody, who could change it: run `chown root"),
        (0, 0o777, "can be written by everybody, who could change it: run `chmod o-w"),
    ],
)
def test_a_directory_that_others_rule_is_refused(
    line: Line, tmp_path: Path, owner: int, mode: int, message: str
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    place.chmod(mode)
    os.chown(place, owner, owner)
    result = start_in(line.hosts[1], place)
    assert result.returncode == 1
    assert f"{place} {message}" in result.stderr
    assert list(place.iterdir()) == []


def test_a_directory_behind_another_users_link_is_refused(line: Line, tmp_path: Path) -> None:
    place, link = tmp_path / "place", tmp_path / "link"
    place.mkdir()
    link.symlink_to(place)
    os.lchown(link, NOBODY, NOBODY)
    result = start_in(line.hosts[1], link)
    assert result.returncode == 1
    assert f"{link} belongs to nobody, who could change it" in result.stderr
    assert list(place.iterdir()) == []


def test_directories_and_files_have_their_modes_whatever_the_umask(
    line: Line, start_relay: StartRelay, tmp_path: Path
) -> None:
    host = Through(line.hosts[1], "sh", "-c", 'umask 0; exec "$@"', "sh")
    place = tmp_path / "new" / "place"
    relay = start_relay(host, ("left",), 1, "--socket", str(place / "control.sock"))
    wait_until((place / "control.inventory").exists, "the inventory")
    modes = {path.name: stat.S_IMODE(path.lstat().st_mode) for path in (place.parent, place, *place.iterdir())}
    expected = {"new": 0o755, "place": 0o755, "control.sock": 0o666, "control.handover": 0o600}
    assert modes == expected | {"control.inventory": 0o600}
    relay.process.send_signal(signal.SIGINT)
    assert relay.process.wait(10) == 0
    assert list(place.iterdir()) == []


def test_what_was_put_in_the_place_of_the_control_socket_is_not_removed(
    line: Line, start_relay: StartRelay, tmp_path: Path
) -> None:
    relay = start_relay(line.hosts[1])
    relay.socket.unlink()
    file = foreign_file(tmp_path).rename(relay.socket)
    relay.process.send_signal(signal.SIGINT)
    assert relay.process.wait(10) == 0
    assert_untouched(file)
