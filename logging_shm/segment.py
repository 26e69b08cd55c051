"""Segments: creating, mapping and removing the shared memory of one ring.

The creator owns the name and unlinks it; an attached process only maps it. A segment whose creator is gone is
stale: its owner's pid no longer runs, or runs since another start time.
"""

import mmap
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import posix_ipc

from logging_shm.facility import Facility, Severity
from logging_shm.layout import (
    ABI_VERSION,
    FORMAT_BYTES_MAX,
    FORMATS,
    FORMATS_MAX,
    FORMATS_OFFSET,
    HEADER,
    LEVEL_MASK_ALL,
    RECORD_BYTES,
    SEGMENT_MAGIC,
    segment_bytes,
)


class SegmentError(Exception):
    """A segment that can't be created, or that is none of ours."""


def process_start_ticks(pid: int) -> int | None:
    """The start time of a process in clock ticks since boot (proc(5), stat field 22), None when gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])


class Segment:
    """A mapped segment; a context manager. `bytes` is the whole of it as a uint8 array."""

    def __init__(self, name: str, fd: int, owner: bool) -> None:
        """Map `fd` and close it. Raises SegmentError when it holds no segment of this version."""
        self.name = name
        self._owner = owner
        try:
            size = os.fstat(fd).st_size
            if size < segment_bytes(0):
                raise SegmentError(f"/dev/shm/{name} is truncated: {size} bytes")
            self._map = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        self.bytes: Any = np.frombuffer(self._map, np.uint8)
        self.header: Any = self.bytes[: HEADER.itemsize].view(HEADER)[0]

    @classmethod
    def create(
        cls,
        name: str,
        facility: Facility,
        capacity: int,
        core: int | None = None,
        formats: dict[int, str] | None = None,
        uid: int = -1,
        gid: int = -1,
    ) -> Self:
        """Create a segment with every page present, and hand it to `uid`:`gid`.

        Raises SegmentError when the name belongs to a living process, or /dev/shm has no room.
        """
        remove_stale(name)
        try:
            shm = posix_ipc.SharedMemory(f"/{name}", posix_ipc.O_CREX, mode=0o600)
        except posix_ipc.ExistentialError as error:
            raise SegmentError(f"/dev/shm/{name} exists already: is another instance running?") from error
        try:
            os.posix_fallocate(shm.fd, 0, segment_bytes(capacity))
            os.fchown(shm.fd, uid, gid)
        except OSError as error:
            os.close(shm.fd)
            posix_ipc.unlink_shared_memory(f"/{name}")
            raise SegmentError(f"/dev/shm/{name}: {error.strerror}: make room in /dev/shm") from error
        segment = cls(name, shm.fd, owner=True)
        header = segment.header
        header["abi_version"] = ABI_VERSION
        header["record_bytes"] = RECORD_BYTES
        header["capacity"] = capacity
        header["facility"] = facility
        header["core"] = 0 if core is None else core
        header["realtime_offset_ns"] = time.time_ns() - time.monotonic_ns()
        header["level_mask"] = LEVEL_MASK_ALL
        segment.claim()
        segment._write_formats(formats or {})
        header["magic"] = SEGMENT_MAGIC
        return segment

    @classmethod
    def attach(cls, name: str) -> Self:
        """Map an existing segment. Raises SegmentError when there is none, or it is not one of ours."""
        try:
            shm = posix_ipc.SharedMemory(f"/{name}")
        except posix_ipc.Error as error:
            raise SegmentError(f"/dev/shm/{name}: {error}") from error
        segment = cls(name, shm.fd, owner=False)
        header = segment.header
        if header["magic"] != SEGMENT_MAGIC or header["abi_version"] != ABI_VERSION:
            raise SegmentError(f"/dev/shm/{name} is no log segment of version {ABI_VERSION}")
        if len(segment.bytes) < segment_bytes(int(header["capacity"])):
            raise SegmentError(f"/dev/shm/{name} is truncated: {len(segment.bytes)} bytes")
        return segment

    def claim(self) -> None:
        """Name the calling process as the one that writes."""
        self.header["owner_pid"] = os.getpid()
        self.header["owner_start_ticks"] = process_start_ticks(os.getpid()) or 0
        self.header["thread"] = os.getpid()

    @property
    def level(self) -> Severity:
        """The least grave severity that is written."""
        return Severity(max(int(self.header["level_mask"]).bit_length() - 1, 0))

    @level.setter
    def level(self, severity: Severity) -> None:
        """Write records as grave as `severity` or graver, from the writer's next one on."""
        self.header["level_mask"] = (2 << severity) - 1

    def _write_formats(self, formats: dict[int, str]) -> None:
        table = self.bytes[FORMATS_OFFSET : FORMATS_OFFSET + FORMATS.itemsize].reshape(FORMATS_MAX, FORMAT_BYTES_MAX)
        for number, text in formats.items():
            encoded = text.encode()
            assert 0 < number < FORMATS_MAX
            assert len(encoded) <= FORMAT_BYTES_MAX
            table[number, : len(encoded)] = np.frombuffer(encoded, np.uint8)

    def format(self, number: int) -> str | None:
        """The registered format, None when there is none."""
        if not 0 < number < FORMATS_MAX:
            return None
        start = FORMATS_OFFSET + number * FORMAT_BYTES_MAX
        text = bytes(self.bytes[start : start + FORMAT_BYTES_MAX]).rstrip(b"\0")
        return text.decode("utf-8", "replace") or None

    def close(self) -> None:
        """Unlink the name if this process made it; the mapping ends with its last view."""
        if self._owner:
            self._owner = False
            posix_ipc.unlink_shared_memory(f"/{self.name}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def owner_is_alive(segment: Segment) -> bool:
    """Whether the process that claimed the segment still runs; a reused pid is told by its start time."""
    start = process_start_ticks(int(segment.header["owner_pid"]))
    return start is not None and start == int(segment.header["owner_start_ticks"])


def remove_stale(name: str) -> bool:
    """Remove a segment whose owner is gone; True when there was one."""
    try:
        segment = Segment.attach(name)
    except SegmentError:
        return False
    if owner_is_alive(segment):
        raise SegmentError(
            f"/dev/shm/{name} belongs to process {int(segment.header['owner_pid'])}, which is running: "
            "stop it, or choose another --instance"
        )
    posix_ipc.unlink_shared_memory(f"/{name}")
    return True
