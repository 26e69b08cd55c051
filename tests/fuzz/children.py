"""A child process that is watched: its death by a signal, or that it makes no progress any more, is a finding."""

import mmap
import os
import resource
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

STALL_S = 180.0  # without progress, on a machine that has other things to do
POLL_S = 0.02
PROGRESS_BYTES = 1 << 17
_COUNT = struct.Struct("<q")


class Progress:
    """How far a child came: a number, and what it was at, in a file that outlives it."""

    def __init__(self, path: Path) -> None:
        """Raises OSError when the file is not there; `create` makes it."""
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), PROGRESS_BYTES)

    @classmethod
    def create(cls, path: Path) -> "Progress":
        """A file for a child that is started next."""
        path.write_bytes(bytes(PROGRESS_BYTES))
        return cls(path)

    def tell(self, number: int, what: str = "") -> None:
        """For the child: it begins with this now."""
        _COUNT.pack_into(self._map, 0, number)
        encoded = what.encode()[: PROGRESS_BYTES - 2 * _COUNT.size]
        _COUNT.pack_into(self._map, _COUNT.size, len(encoded))
        self._map[2 * _COUNT.size : 2 * _COUNT.size + len(encoded)] = encoded

    @property
    def number(self) -> int:
        """What the child told last."""
        return int(_COUNT.unpack_from(self._map, 0)[0])

    @property
    def what(self) -> str:
        """What the child told last."""
        length = _COUNT.unpack_from(self._map, _COUNT.size)[0]
        return self._map[2 * _COUNT.size : 2 * _COUNT.size + length].decode(errors="replace")


@dataclass
class Ended:
    """How a child ended. `status` is negative for a signal; `stalled` when it had to be killed."""

    status: int
    output: str
    stalled: bool
    progress: Progress


def run(
    module: str, *arguments: str, progress: Path, on_end: Callable[[], None] = lambda: None, stall_s: float = STALL_S
) -> Ended:
    """Run a module of tests.fuzz to its end; `on_end` is called before anything of the child is cleaned up."""
    told = Progress.create(progress)
    output = progress.with_suffix(".out")
    command = [sys.executable, "-m", f"tests.fuzz.{module}", *arguments, "--progress", str(progress)]
    with output.open("w") as out:
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    stalled = False
    try:
        seen, since_s = -1, time.monotonic()
        while child.poll() is None:
            if told.number != seen:
                seen, since_s = told.number, time.monotonic()
            elif time.monotonic() - since_s > stall_s:
                stalled = True
                break
            time.sleep(POLL_S)
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
        on_end()
    return Ended(child.returncode, output.read_text(), stalled, told)


def resident_bytes() -> int:
    """What this process holds in memory now (proc(5), statm)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def count(variable: str, default: int) -> int:
    """How much to do: an environment variable, or the default."""
    return int(os.environ.get(variable, str(default)))
