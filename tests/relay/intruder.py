"""What a process that was taken over would try. Runs inside a worker, the template or the control plane.

    python -m tests.relay.intruder worker|controlplane ARGUMENTS…

starts the real process with its real arguments, and all its set-up and confinement. Only then comes the intrusion: the
first message that arrives names an attempt. What the attempt gives, or the errno, is printed as one JSON line.
"""

import ctypes
import json
import mmap
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from relay.confinement.capabilities import Capability, keep_only, prctl
from relay.confinement.seccomp import ARCHITECTURES

LIBC = ctypes.CDLL(None, use_errno=True)
MACHINE = os.uname().machine
OTHERS = {  # that no role has; none: no call has this number
    "x86_64": {"ptrace": 101, "unshare": 272, "process_vm_readv": 310, "openat2": 437, "none": 1000},
    "aarch64": {"ptrace": 117, "unshare": 97, "process_vm_readv": 270, "openat2": 437, "none": 1000},
}
NUMBERS = ARCHITECTURES[MACHINE][1] | OTHERS[MACHINE]
PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PTRACE_ATTACH = 16
IORING_OP_SENDMSG = 9
IORING_OP_OPENAT = 18
IORING_OP_SOCKET = 45
IORING_ENTER_GETEVENTS = 1
AT_FDCWD = -100
SELF = Path("/proc/self/stat")
CACHE = Path(sys.prefix) / "var"
TARGET = int(os.environ.get("INTRUDER_TARGET", "0"))  # another process of the same user
SEGMENT = os.environ.get("INTRUDER_SEGMENT", "")  # another worker's
SEGMENT_BYTES = int(os.environ.get("INTRUDER_SEGMENT_BYTES", "0"))  # the size of its own
UNCONFINED = bool(os.environ.get("INTRUDER_UNCONFINED"))  # to see that an attempt works where nothing hinders it


class Held:
    """What the process has that was taken over."""

    worker: Any = None  # the Worker, in a worker


def call(name: str, *arguments: object) -> int:
    """A system call by its name. Raises OSError."""
    result = int(LIBC.syscall(ctypes.c_long(NUMBERS[name]), *arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def own_segment_descriptor() -> int:
    """The descriptor behind the mapping of a log segment: Python keeps it."""
    for descriptor in range(3, 64):
        try:
            if os.fstat(descriptor).st_size == SEGMENT_BYTES:
                return descriptor
        except OSError:
            continue
    raise AssertionError("no such descriptor")


def shrink() -> None:
    os.ftruncate(own_segment_descriptor(), 0)


def punch() -> None:
    LIBC.fallocate(own_segment_descriptor(), 0x02 | 0x01, ctypes.c_long(0), ctypes.c_long(4096))


def uring(opcode: int, **fields: int) -> int:
    """The result of one operation on the worker's own ring."""
    worker = Held.worker
    sqe, memory = worker.uring.sqes[0], worker.memory.worker
    former = sqe.copy()
    sqe["opcode"] = opcode
    for name, value in fields.items():
        sqe[name] = value
    tail = ctypes.c_uint32.from_address(worker.uring.sq_tail_ptr)
    tail.value += 1
    memory["sq_tail"] = tail.value
    entered = worker.uring._library.io_uring_enter(worker.uring.fd, 1, 1, IORING_ENTER_GETEVENTS, None)
    worker.uring.sqes[0] = former
    assert entered == 1, entered
    head = ctypes.c_uint32.from_address(worker.uring.cq_head_ptr)
    result = int(worker.uring.cqes[head.value & worker.uring.cq_mask]["res"])
    head.value += 1
    return result


def uring_open() -> int:
    path = ctypes.create_string_buffer(b"/etc/passwd")
    return uring(IORING_OP_OPENAT, fd=AT_FDCWD, addr=ctypes.addressof(path), len=0)


def uring_send_flagged() -> int:
    return uring(IORING_OP_SENDMSG, flags=1 << 4)  # IOSQE_ASYNC


def executable_memory() -> None:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)


def make_executable() -> None:
    page = mmap.mmap(-1, 4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    LIBC.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(4096), 5)


def fork() -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    return pid


def report_an_error() -> str:
    """As Python does, which looks for the source text."""
    try:
        raise ValueError("as any")
    except ValueError:
        return traceback.format_exc()


def allocate() -> int:
    """What running Python does: arenas come and go, large blocks grow."""
    blocks = [bytearray(1 << 20) for _ in range(64)]
    for block in blocks:
        block.extend(bytes(3 << 20))
    return sum(map(len, blocks))


ATTEMPTS: dict[str, Callable[[], object]] = {
    "nothing": lambda: None,
    "allocate": allocate,
    "report an error": report_an_error,
    "open a file": lambda: os.open("/etc/passwd", os.O_RDONLY),
    "stat a file": lambda: Path("/etc/passwd").stat().st_size,
    "open a sibling's segment": lambda: os.open(f"/dev/shm/{SEGMENT}", os.O_RDWR),
    "write to the code cache": lambda: os.open(CACHE / "intruder", os.O_WRONLY | os.O_CREAT),
    "open by openat2": lambda: call("openat2", AT_FDCWD, b"/etc/passwd", None, 0),
    "unlink": Path("/dev/shm", SEGMENT).unlink,
    "make a socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close(),
    "make a socket pair": socket.socketpair,
    "execute": lambda: os.execv("/bin/true", ["true"]),
    "fork": fork,
    "make a thread": lambda: call("clone", ctypes.c_long(0x0001_0F00), None, None, None, None),
    "unshare": lambda: call("unshare", ctypes.c_long(0x1000_0000)),
    "trace a sibling": lambda: call("ptrace", PTRACE_ATTACH, TARGET, 0, 0),
    "read a sibling's memory": lambda: call("process_vm_readv", TARGET, None, 0, None, 0, 0),
    "kill a sibling": lambda: os.kill(TARGET, signal.SIGKILL),
    "signal a sibling's thread": lambda: call("tgkill", TARGET, TARGET, int(signal.SIGKILL)),
    "change its limits": lambda: call("prlimit64", 0, 7, None, None),
    "become dumpable": lambda: call("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0),
    "shrink its segment": shrink,
    "punch a hole into its segment": punch,
    "write to a descriptor": lambda: os.write(own_segment_descriptor(), b""),
    "make memory executable": make_executable,
    "map executable memory": executable_memory,
    "set up another io_uring": lambda: call("io_uring_setup", 1, ctypes.byref(ctypes.create_string_buffer(120))),
    "register with its io_uring": lambda: call("io_uring_register", Held.worker.uring.fd, 0, None, 0),
    "open by io_uring": uring_open,
    "make a socket by io_uring": lambda: uring(IORING_OP_SOCKET, fd=2, len=0),
    "send with flags by io_uring": uring_send_flagged,
    "set another socket option": lambda: Held.worker.channel._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1),
    "call by x32": lambda: LIBC.syscall(ctypes.c_long(0x4000_0000 | 39)),
    "call with another number": lambda: call("none"),
    "abort": os.abort,
}  # fmt: skip


def attempt(name: str) -> None:
    """Try, and print one line before it and one about it."""
    os.write(2, b"trying\n")
    try:
        answer: object = ATTEMPTS[name]()
    except OSError as error:
        answer = {"errno": error.errno}
    os.write(2, json.dumps({"answer": answer}, default=str).encode() + b"\n")


def intrude_into_workers() -> None:
    """Have the loop give way to the first message."""
    from relay.dataplane import worker as module

    def run(self: Any) -> None:
        Held.worker = self
        name = b""
        while not name:
            try:
                name, _, _, _ = self.channel._socket.recvmsg(100)
            except BlockingIOError:
                LIBC.poll(None, 0, 10)
        attempt(name.decode())

    module.Worker.run = run  # type: ignore[method-assign]


def intrude_into_the_template() -> None:
    """The first message that is none of the supervisor's."""
    from relay.dataplane import template as module

    def serve(self: Any, wakeup: socket.socket) -> bool:
        attempt(self._channel._socket.recv(100).decode())
        return False

    module.Template._serve = serve  # type: ignore[method-assign]


def intrude_into_the_control_plane() -> None:
    """The first message of the supervisor's stream."""
    from relay import framing

    def feed(self: Any, received: bytes) -> list[object]:
        attempt(received.decode())
        return []

    framing.FrameBuffer.feed = feed  # type: ignore[method-assign]


def let_everything_pass() -> None:
    """Leave seccomp, Landlock and the restrictions of io_uring out."""
    from relay.confinement import landlock, roles, seccomp
    from relay.dataplane import uring as module

    seccomp.confine = lambda policy: True
    landlock.restrict = lambda beneath=None: True
    roles._confine = lambda policy: True

    def enable(self: Any, operations: Any) -> None:
        assert self._library.io_uring_enable_rings(ctypes.byref(self._ring)) == 0

    module.Uring._restrict = enable  # type: ignore[method-assign]


def be_a_service(uid: int) -> None:
    """Go on as a user that is not root, and has a capability: to read Python wherever it lies."""
    prctl(PR_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setresuid(uid, uid, uid)
    keep_only({Capability.CAP_DAC_OVERRIDE})


def main() -> None:
    """Become the process that is named, with the rest of the command line."""
    role = sys.argv.pop(1)
    if "INTRUDER_USER" in os.environ:
        be_a_service(int(os.environ["INTRUDER_USER"]))
    if UNCONFINED:
        let_everything_pass()
    if role == "controlplane":
        from relay.controlplane.__main__ import main as start

        intrude_into_the_control_plane()
    else:
        from relay.dataplane.template import main as start

        (intrude_into_workers if role == "worker" else intrude_into_the_template)()
    start()


if __name__ == "__main__":
    main()
