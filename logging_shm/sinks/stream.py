"""A stream that is open already: standard output, a pipe. Colour where it is a terminal and NO_COLOR is not set."""

import os
import sys
from dataclasses import replace

from logging_shm.sinks.base import Chunk, Sink
from logging_shm.sinks.selection import Selection


class StreamSink(Sink):
    """Writes to a file descriptor, which stays open."""

    def __init__(self, fd: int | None = None, kind: str = "text", selection: Selection | None = None) -> None:
        self._fd = sys.stdout.fileno() if fd is None else fd
        selection = selection or Selection()
        if kind == "text" and os.isatty(self._fd) and not os.environ.get("NO_COLOR"):
            selection = replace(selection, colours=True)
        super().__init__("stdout" if fd is None else f"fd {fd}", kind, selection)

    def deliver(self, chunk: Chunk) -> int:
        """Write all, waiting for a slow reader; only this sink waits."""
        data = memoryview(chunk.data)
        while data:
            data = data[os.write(self._fd, data) :]
        return len(chunk.ends)

    def close_target(self) -> None:
        """Leave the descriptor to whoever opened it."""
