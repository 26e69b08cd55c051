"""A file: rotated by size or age, reopened when asked to, and patient with a full disk."""

import os
import time
from pathlib import Path

from logging_shm.sinks.base import Chunk, Sink
from logging_shm.sinks.selection import Selection

FILE_MODE = 0o640


class FileSink(Sink):
    """Appends to `path`. At `rotate_bytes` or `rotate_s` it becomes `path.1`, that `path.2`, up to `path.keep`.

    A limit of 0 never rotates.
    """

    def __init__(
        self,
        path: str | Path,
        kind: str = "text",
        selection: Selection | None = None,
        rotate_bytes: int = 0,
        rotate_s: float = 0,
        keep: int = 7,
    ) -> None:
        """Open the file. Raises OSError: a path that can't be written is told at start, not later."""
        self._path = Path(path)
        super().__init__(f"file {path}", kind, selection)
        self._rotate_bytes, self._rotate_s, self._keep = rotate_bytes, rotate_s, keep
        self._fd = -1
        self._size = 0
        self._opened_s = 0.0
        self._part = 0  # bytes of the last chunk that a full disk took: it goes on behind them
        self._open()

    def _open(self) -> None:
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
        self._size = os.fstat(self._fd).st_size
        self._opened_s = time.monotonic()

    def deliver(self, chunk: Chunk) -> int:
        """Append a chunk. What a full disk took of it is not written twice."""
        if self._rotate_bytes and self._part == 0 and self._size + len(chunk.data) > self._rotate_bytes:
            self._rotate()
        if self._fd < 0:
            self._open()
        while self._part < len(chunk.data):
            count = os.write(self._fd, memoryview(chunk.data)[self._part :])
            self._part += count
            self._size += count
        self._part = 0
        return len(chunk.ends)

    def maintain(self) -> None:
        """Rotate a file that is old enough, and not empty."""
        if self._rotate_s and self._size and self._part == 0 and time.monotonic() - self._opened_s >= self._rotate_s:
            self._rotate()

    def _rotate(self) -> None:
        """Shift `path` → `path.1` → … → `path.keep`; the oldest goes."""
        if self._size == 0:
            return
        self.close_target()
        for number in range(self._keep, 0, -1):
            source = self._path if number == 1 else self._numbered(number - 1)
            if source.exists():
                source.replace(self._numbered(number))
        if self._keep == 0:
            self._path.unlink(missing_ok=True)
        self._size = 0

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")

    def close_target(self) -> None:
        """Close the file; the next chunk opens it again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
