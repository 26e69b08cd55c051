"""A file: rotated by size or age, reopened when asked to or when it was moved away, and patient with a full disk.

Lines are written whole. What a full disk took of a line is cut off again, so that the line can follow as a whole when
there is room; where that can't be done, the line begins anew behind the torn piece.
"""

import contextlib
import os
import stat
import time
from pathlib import Path

import numpy as np

from logging_shm.facility import Severity
from logging_shm.sinks.base import Chunk, Sink
from logging_shm.sinks.selection import Selection
from logging_shm.sinks.target import open_log

ROTATE_RETRY_S = 60.0  # after a rotation that failed


class FileSink(Sink):
    """Appends to `path`. At `rotate_bytes` or `rotate_s` it becomes `path.1`, that `path.2`, up to `path.keep`.

    A limit of 0 never rotates. Age counts from when the file was opened.
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
        self._identity = (0, 0)
        self._size = 0
        self._opened_s = 0.0
        self._torn = False  # the file ends in the middle of a line
        self._rotation_failed_s = 0.0
        self._open()

    def _open(self) -> None:
        self._fd = open_log(self._path)
        status = os.fstat(self._fd)
        self._identity, self._size = (status.st_dev, status.st_ino), status.st_size
        self._opened_s = time.monotonic()
        self._torn = stat.S_ISREG(status.st_mode) and self._size > 0 and not self._ends_with_a_line()

    def _ends_with_a_line(self) -> bool:
        """Whether whoever wrote last could finish; True where it can't be told."""
        with contextlib.suppress(OSError), self._path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() == b"\n"
        return True

    def deliver(self, chunk: Chunk) -> None:
        """Append the chunk's lines; between two of them the file may be rotated."""
        self._follow_path()
        while self.done < len(chunk.ends) and not self.ended:
            if self._fd < 0:
                self._open()
            fitting = self._fitting(chunk)
            if fitting == 0 and self._rotate():
                continue
            self._append(chunk, self.done + fitting if fitting else len(chunk.ends))

    def _follow_path(self) -> None:
        """Close a file that is not under its path any more."""
        if self._fd < 0:
            return
        try:
            status = self._path.stat(follow_symlinks=False)
        except FileNotFoundError:
            self.close_target()
            return
        if (status.st_dev, status.st_ino) != self._identity:
            self.close_target()

    def _fitting(self, chunk: Chunk) -> int:
        """How many of the next lines the file may take before it is rotated. An empty one takes at least one."""
        left = len(chunk.ends) - self.done
        if not self._rotate_bytes:
            return left
        room = chunk.start(self.done) + self._rotate_bytes - self._size
        fitting = int(np.searchsorted(chunk.ends, room, "right")) - self.done
        return max(fitting, 0 if self._size else 1)

    def _append(self, chunk: Chunk, until: int) -> None:
        """Write the lines from `done` up to the line `until`; those that a full disk took are done all the same."""
        if self._torn:
            self._size += os.write(self._fd, b"\n")
            self._torn = False
        at, end = chunk.start(self.done), chunk.start(until)
        data = memoryview(chunk.data)
        try:
            while at < end:
                count = os.write(self._fd, data[at:end])
                at += count
                self._size += count
        finally:
            whole = int(np.searchsorted(chunk.ends, at, "right")) - self.done
            torn = at - chunk.start(self.done + whole)
            if torn:
                self._cut_off(torn)
            self.advance(whole)

    def _cut_off(self, torn: int) -> None:
        """Remove the last bytes, unless somebody else has appended behind them."""
        self._torn = True
        with contextlib.suppress(OSError):
            end = os.lseek(self._fd, 0, os.SEEK_CUR)
            if os.fstat(self._fd).st_size == end:
                os.ftruncate(self._fd, end - torn)
                self._size -= torn
                self._torn = False

    def maintain(self) -> None:
        """Rotate a file that is old enough, and not empty."""
        if self._rotate_s and self._size and time.monotonic() - self._opened_s >= self._rotate_s:
            self._follow_path()
            if self._fd >= 0:
                self._rotate()

    def _rotate(self) -> bool:
        """Shift `path` → `path.1` → … → `path.keep`; the oldest goes. False where that fails: the file grows on."""
        now_s = time.monotonic()
        if self._rotation_failed_s and now_s - self._rotation_failed_s < ROTATE_RETRY_S:
            return False
        try:
            self._shift()
        except OSError as error:
            if not self._rotation_failed_s:
                reason = error.strerror or error
                self._tell(Severity.Error, f"Log sink {self.name} can't be rotated: {reason}: it grows on")
            self._rotation_failed_s = now_s
            return False
        self.close_target()
        self._size = 0
        self._rotation_failed_s = 0.0
        return True

    def _shift(self) -> None:
        if self._keep == 0:
            self._path.unlink(missing_ok=True)
        for number in range(self._keep, 0, -1):
            source = self._path if number == 1 else self._numbered(number - 1)
            if os.path.lexists(source):
                source.replace(self._numbered(number))

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")

    def close_target(self) -> None:
        """Close the file; the next chunk opens it again."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
