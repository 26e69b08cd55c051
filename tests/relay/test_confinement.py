"""What a confined process can't do: tried from inside, in a child that confines itself as the role does."""

import contextlib
import ctypes
import errno
import mmap
import os
import pwd
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from relay.confinement import capabilities, landlock, roles, seccomp
from relay.dataplane.layout import IO_URING_SQE
from relay.dataplane.uring import Uring
from relay.privileges import drop_to
from tools.environment import CHECKOUT

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="giving up root needs root")
NOBODY = pwd.getpwnam("nobody")
ROLES: dict[str, Callable[[], object]] = {
    "control plane": roles.confine_control_plane,
    "template": roles.confine_template,
    "worker": roles.confine_worker,
}
PTRACE_ATTACH = 16
IORING_OP_OPENAT = 18
REFUSED_STATUS = 77  # the kernel said no
DONE_STATUS = 0
OTHER_STATUS = 70
PR_CAP_AMBIENT_IS_SET = 1

libc = ctypes.CDLL(None, use_errno=True)


class Inside:
    """What an attempt may use: made before confinement, as a role's own things are."""

    def __init__(self) -> None:
        self.segment = tempfile.TemporaryFile(dir="/dev/shm")  # noqa: SIM115 - for the child's life
        self.segment.truncate(mmap.PAGESIZE)
        self.sibling = os.getppid()
        self.uring = Uring(8)
        self.code = mmap.mmap(-1, mmap.PAGESIZE)


def check(result: int) -> None:
    """Raise the error of a C call."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def open_a_file(_: Inside) -> None:
    Path("/etc/passwd").read_bytes()


def open_a_segment_by_name(_: Inside) -> None:
    os.close(os.open("/dev/shm/mcr_confinement_test", os.O_RDWR | os.O_CREAT))


def make_a_socket(_: Inside) -> None:
    socket.socket(socket.AF_INET, socket.SOCK_STREAM)


def make_a_packet_socket(_: Inside) -> None:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0x0300)


def execute(_: Inside) -> None:
    os.execv("/bin/true", ["true"])


def trace_a_sibling(inside: Inside) -> None:
    check(libc.ptrace(PTRACE_ATTACH, inside.sibling, 0, 0))


def signal_another(inside: Inside) -> None:
    os.kill(inside.sibling, 0)


def shrink_its_segment(inside: Inside) -> None:
    os.ftruncate(inside.segment.fileno(), 0)


def fork(_: Inside) -> None:
    if os.fork() == 0:
        os._exit(0)


def make_memory_executable(inside: Inside) -> None:
    address = ctypes.addressof(ctypes.c_char.from_buffer(inside.code))
    check(libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), 7))


def map_executable_memory(_: Inside) -> None:
    mmap.mmap(-1, mmap.PAGESIZE, prot=7)


def set_up_another_io_uring(_: Inside) -> None:
    Uring(8)


def open_by_io_uring(inside: Inside) -> None:
    path = ctypes.create_string_buffer(b"/etc/passwd")
    ring = inside.uring
    sqe = np.zeros(1, IO_URING_SQE)
    sqe["opcode"], sqe["fd"], sqe["addr"] = IORING_OP_OPENAT, -100, ctypes.addressof(path)
    ring.sqes[0] = sqe[0]
    ctypes.c_uint32.from_address(ring.sq_tail_ptr).value += 1
    check(libc.syscall(426, ring.fd, 1, 1, 1, None, 0))
    result = int(ring.cqes[0]["res"])
    if result < 0:
        raise OSError(-result, os.strerror(-result))


def become_root(_: Inside) -> None:
    os.setresuid(0, 0, 0)


def change_its_scheduling(_: Inside) -> None:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))


EVERYWHERE: list[Callable[[Inside], None]] = [
    open_a_file, make_a_socket, make_a_packet_socket, execute, trace_a_sibling, signal_another, shrink_its_segment,
    make_memory_executable, map_executable_memory, open_by_io_uring, become_root, change_its_scheduling,
]  # fmt: skip
STEADY: list[Callable[[Inside], None]] = [open_a_segment_by_name, fork, set_up_another_io_uring]
# A parent that waits can't be traced, and every io_uring of ours is restricted from the start.
POSSIBLE = [attempt for attempt in (*EVERYWHERE, *STEADY) if attempt not in (trace_a_sibling, open_by_io_uring)]
ATTEMPTS = [(role, attempt) for role in ROLES for attempt in EVERYWHERE] + [
    (role, attempt) for role in ("control plane", "worker") for attempt in STEADY
]


def outcome(role: str, attempt: Callable[[Inside], None] | None) -> int:
    """How a child ends that confines itself as a role and tries: a wait status."""
    pid = os.fork()
    if pid == 0:
        status = OTHER_STATUS
        try:
            inside = Inside()
            drop_to(NOBODY.pw_uid, NOBODY.pw_gid)
            ROLES[role]()
            if attempt is not None:
                attempt(inside)
            status = DONE_STATUS
        except OSError as error:
            status = REFUSED_STATUS if error.errno in (errno.EACCES, errno.EPERM) else OTHER_STATUS
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@needs_root
@pytest.mark.parametrize("role", ROLES)
def test_a_confined_process_lives(role: str) -> None:
    assert outcome(role, None) == DONE_STATUS


@needs_root
@pytest.mark.parametrize(("role", "attempt"), ATTEMPTS, ids=lambda value: getattr(value, "__name__", value))
def test_an_attempt_is_refused_or_kills(role: str, attempt: Callable[[Inside], None]) -> None:
    assert outcome(role, attempt) in (REFUSED_STATUS, -signal.SIGSYS)
    assert not Path("/dev/shm/mcr_confinement_test").exists()


@needs_root
@pytest.mark.parametrize("attempt", POSSIBLE, ids=lambda attempt: attempt.__name__)
def test_each_attempt_succeeds_where_nothing_is_confined(attempt: Callable[[Inside], None]) -> None:
    """Or else the tests above could not fail."""
    pid = os.fork()
    if pid == 0:
        status = OTHER_STATUS
        with contextlib.suppress(OSError):
            attempt(Inside())
            status = DONE_STATUS
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == DONE_STATUS
    Path("/dev/shm/mcr_confinement_test").unlink(missing_ok=True)


@needs_root
def test_landlock_alone_keeps_files_closed() -> None:
    if landlock.abi() == 0:
        pytest.skip("this kernel has no Landlock")
    code = (
        "from pathlib import Path; from relay.confinement import capabilities, landlock;"
        "capabilities.prctl(38, 1); assert landlock.restrict({Path('/proc'): landlock.READ});"
        "Path('/proc/self/stat').read_text(); Path('/etc/passwd').read_text()"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert "PermissionError: [Errno 13] Permission denied: '/etc/passwd'" in result.stderr


@needs_root
def test_capabilities_are_given_up_for_good() -> None:
    code = (
        "from relay.confinement import capabilities as c; c.bound_to(c.AT_START); c.keep_only(c.SUPERVISOR);"
        "print(sorted(i for i in range(64) if c.permitted() >> i & 1))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(sorted(int(capability) for capability in capabilities.SUPERVISOR))


def test_another_machine_has_its_own_numbers() -> None:
    for machine in seccomp.ARCHITECTURES:
        for allowed in (seccomp.CONTROL_PLANE, seccomp.TEMPLATE, seccomp.WORKER):
            program = seccomp.assemble(allowed, machine)
            assert len(program) < 4096
            for at, (code, jt, jf, _) in enumerate(program):
                if code & 7 == 5:  # BPF_JMP
                    assert at + 1 + max(jt, jf) < len(program)


def test_structures_have_the_kernels_sizes() -> None:
    assert ctypes.sizeof(landlock.RulesetAttr) == 24
    assert ctypes.sizeof(landlock.PathBeneathAttr) == 12
    assert ctypes.sizeof(capabilities.UserCapHeader) == 8
    assert ctypes.sizeof(capabilities.UserCapData) == 12
    assert len(seccomp.encode([(0, 0, 0, 0)])) == 8
