"""A stream that is open already: standard output, a pipe. Colour where it is a terminal and NO_COLOR is not set."""

import contextlib
import errno
import os
import select
import stat
import sys
import time
from dataclasses import replace

import numpy as np

from logging_shm.sinks.base import Chunk, Sink
from logging_shm.sinks.selection import Selection

ROOM_MS = 200  # how long to wait for a reader before looking whether the sink was ended
NO_ROOM_S = 0.01  # where poll(2) sees room and write(2) none


def wants_colour(fd: int) -> bool:
    """Whether a reader of a stream would see colours as colours, and wants them (https://no-color.org)."""
    return os.isatty(fd) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class StreamSink(Sink):
    """Writes to a file descriptor, which stays open, blocking or not."""

    def __init__(self, fd: int | None = None, kind: str = "text", selection: Selection | None = None) -> None:
        """Raises OSError where there is no standard output: its descriptor may be another file's by now."""
        if fd is None and sys.__stdout__ is None:
            raise OSError(errno.EBADF, "standard output is closed")
        self._fd = 1 if fd is None else fd
        selection = selection or Selection()
        if kind == "text" and wants_colour(self._fd):
            selection = replace(selection, colours=True)
        super().__init__("stdout" if fd is None else f"fd {fd}", kind, selection)
        self._part = 0  # bytes of the next message that are written
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLOUT)

    def deliver(self, chunk: Chunk) -> None:
        """Write all, waiting for a slow reader; only this sink waits."""
        data = memoryview(chunk.data)
        at = chunk.start(self.done) + self._part
        while at < len(data) and not self.ended:
            at += self._write(data[at:])
            whole = int(np.searchsorted(chunk.ends, at, "right")) - self.done
            self._part = at - chunk.start(self.done + whole)
            self.advance(whole)

    def _write(self, data: memoryview) -> int:
        """Write what there is room for. Never blocks in write(2), where nothing could end it."""
        if not self._poll.poll(ROOM_MS):
            return 0
        with contextlib.suppress(BlockingIOError):
            # Where poll(2) sees room in a pipe, it is for so many bytes at least.
            return os.write(self._fd, data if self._is_file() else data[: select.PIPE_BUF])
        time.sleep(NO_ROOM_S)
        return 0

    def _is_file(self) -> bool:
        return stat.S_ISREG(os.fstat(self._fd).st_mode)

    def close_target(self) -> None:
        """Leave the descriptor to whoever opened it."""
