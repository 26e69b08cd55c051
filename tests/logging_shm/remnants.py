"""What may lie in /dev/shm under a segment's name, and processes that live and die as a test wants."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from logging_shm import Facility, Segment
from logging_shm.layout import RECORDS_OFFSET, segment_bytes

SHM = Path("/dev/shm")
CAPACITY = 8


def in_child(action: Callable[[], object]) -> int:
    """Do something in a child process; return its exit code, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@contextmanager
def waiting(prepare: Callable[[], object]) -> Iterator[int]:
    """A child process that did something and keeps what came of it until the block ends; gives its pid."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            kept = prepare()
            os.write(writer, b"ready")
            signal.pause()
            del kept
        finally:
            os._exit(1)
    os.close(writer)
    try:
        assert os.read(reader, 5) == b"ready"
        yield pid
    finally:
        os.close(reader)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def of_a_dead_process(name: str, change: Callable[[Segment], object] = lambda segment: None) -> None:
    """A segment whose creator is gone, changed by it at last."""

    def make() -> None:
        change(Segment.create(name, Facility.Test, CAPACITY))

    in_child(make)


def private(name: str, content: bytes = b"", mode: int = 0o600) -> None:
    """A file with that content."""
    (SHM / name).write_bytes(content)
    (SHM / name).chmod(mode)


def clear(name: str) -> None:
    """Remove whatever has the name."""
    path = SHM / name
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def truncated_to(size: int) -> Callable[[str], None]:
    """A dead process's segment that was cut."""
    return lambda name: of_a_dead_process(name, lambda segment: os.truncate(SHM / name, size))


# What a log left that can't be read any more: removed once nobody has it open.
REMNANTS: dict[str, Callable[[str], None]] = {
    "empty": private,
    "allocated only": lambda name: private(name, bytes(segment_bytes(CAPACITY))),
    "without magic": lambda name: of_a_dead_process(name, lambda segment: segment.set("magic", 0)),
    "another version": lambda name: of_a_dead_process(name, lambda segment: segment.set("abi_version", 1)),
    "truncated": truncated_to(RECORDS_OFFSET + 100),
    "truncated inside the header": truncated_to(100),
    "damaged": lambda name: of_a_dead_process(name, lambda segment: segment.set("capacity", 7)),
}

# What no log made, or somebody changed: never touched.
FOREIGN: dict[str, Callable[[str], None]] = {
    "text": lambda name: private(name, b"somebody's notes\n"),
    "empty but readable": lambda name: private(name, mode=0o644),
    "zeros of another size": lambda name: private(name, bytes(segment_bytes(CAPACITY) + 1)),
    "zeros then data": lambda name: private(name, bytes(segment_bytes(CAPACITY) - 1) + b"x"),
    "another header": lambda name: private(name, bytes(8) + b"\1" + bytes(segment_bytes(CAPACITY) - 9)),
    "wrong mode": lambda name: of_a_dead_process(name, lambda segment: (SHM / name).chmod(0o640)),
    "symlink": lambda name: (SHM / name).symlink_to("/etc/hostname"),
    "dangling symlink": lambda name: (SHM / name).symlink_to("/nonexistent"),
    "directory": lambda name: (SHM / name).mkdir(),
    "fifo": lambda name: os.mkfifo(SHM / name, 0o600),
}
