"""The stats segment of a worker, `mcr_dp_c{core}_stats`: written by that worker, read by anyone allowed to.

The supervisor creates it before the worker starts and removes it at the end. It outlives restarts of the
worker, so counters never go back. Layout: STATS_HEADER, RULE_STATS[RULES_MAX], OUTPUT_STATS[OUTPUTS_MAX], HEALTH,
STREAM[STREAMS_MAX], PID[STREAMS_MAX, PIDS_MAX], PROTECTION[PROTECTIONS_MAX], JOURNAL.
"""

import mmap
import os
from types import TracebackType
from typing import Any, Self

import numpy as np
import posix_ipc

from logging_shm.segment import hand_over
from relay.dataplane import layout


def segment_name(core: int, instance: str | None) -> str:
    """The shm name of a worker's stats segment."""
    return f"mcr_{instance}_dp_c{core}_stats" if instance else f"mcr_dp_c{core}_stats"


def sections_of(segment: Any) -> dict[str, Any]:
    """Views of the parts of a stats segment (u1 array), by their names in memory.ARRAYS."""
    places = {
        "stats": (0, layout.STATS_HEADER, 1),
        "rule_stats": (layout.STATS_RULES_OFFSET, layout.RULE_STATS, layout.RULES_MAX),
        "output_stats": (layout.STATS_OUTPUTS_OFFSET, layout.OUTPUT_STATS, layout.OUTPUTS_MAX),
        "health": (layout.STATS_HEALTH_OFFSET, layout.HEALTH, 1),
        "streams": (layout.STATS_STREAMS_OFFSET, layout.STREAM, layout.STREAMS_MAX),
        "pids": (layout.STATS_PIDS_OFFSET, layout.PID, layout.STREAMS_MAX * layout.PIDS_MAX),
        "protections": (layout.STATS_PROTECTIONS_OFFSET, layout.PROTECTION, layout.PROTECTIONS_MAX),
        "journal": (layout.STATS_JOURNAL_OFFSET, layout.JOURNAL, 1),
    }
    return {name: segment[at : at + dtype.itemsize * count].view(dtype) for name, (at, dtype, count) in places.items()}


class StatsHeader:
    """The header of a mapped stats segment, which versions share. What is behind it differs, and is not mapped.

    A context manager; the creator also unlinks the segment.
    """

    mapped_bytes = layout.STATS_HEADER.itemsize

    def __init__(self, name: str, fd: int, owner: bool, read_only: bool = False) -> None:
        self.name = name
        self._owner = owner
        self._fd = fd
        try:
            protection = mmap.PROT_READ if read_only else mmap.PROT_READ | mmap.PROT_WRITE
            self._map = mmap.mmap(fd, self.mapped_bytes, prot=protection)
        except BaseException:
            os.close(fd)
            raise
        self.bytes: Any = np.frombuffer(self._map, np.uint8)
        self.header: Any = self.bytes[: layout.STATS_HEADER.itemsize].view(layout.STATS_HEADER)[0]

    @classmethod
    def attach(cls, core: int, instance: str | None, read_only: bool = False) -> Self:
        """Map an existing segment.

        Raises posix_ipc.ExistentialError when there is none, posix_ipc.PermissionsError when it is another's,
        ValueError when it is too short.
        """
        name = segment_name(core, instance)
        fd = posix_ipc.SharedMemory(f"/{name}", read_only=read_only).fd
        return cls(name, fd, owner=False, read_only=read_only)

    def ring_doorbell(self) -> None:
        """Have the worker look for messages. It may have left any number there."""
        self.header["doorbell"] = (int(self.header["doorbell"]) + 1) & layout.COUNT_MAX

    def add_ring_full(self, frames: int) -> None:
        """Count what the kernel lost, in frames, as it does. The worker may have left any number there."""
        self.header["ring_full"] = min(int(self.header["ring_full"]) + frames, layout.COUNT_MAX)

    def read_protections(self) -> tuple[Any, Any] | None:
        """Copies of the PROTECTION records and the JOURNAL; None of a version that has them otherwise, or not at all.

        Read, not mapped: another process may have cut the file.
        """
        told = int(self.header["protections_offset"]), int(self.header["protection_bytes"])
        if told != (layout.STATS_PROTECTIONS_OFFSET, layout.PROTECTION.itemsize):
            return None
        wanted = layout.STATS_BYTES - layout.STATS_PROTECTIONS_OFFSET
        content = bytearray(os.pread(self._fd, wanted, layout.STATS_PROTECTIONS_OFFSET))
        if len(content) != wanted:
            return None
        records = np.frombuffer(content, layout.PROTECTION, count=layout.PROTECTIONS_MAX)
        at = layout.STATS_JOURNAL_OFFSET - layout.STATS_PROTECTIONS_OFFSET
        return records, np.frombuffer(content, layout.JOURNAL, count=1, offset=at)[0]

    def fileno(self) -> int:
        """The descriptor, by which the segment can be handed on when its name is another's."""
        return self._fd

    def close(self) -> None:
        """Unlink the segment if this process made it. The mapping ends with the last view."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._owner:
            posix_ipc.unlink_shared_memory(f"/{self.name}")
            self._owner = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class StatsSegment(StatsHeader):
    """A mapped stats segment with all its parts, of this version's layout."""

    mapped_bytes = layout.STATS_BYTES

    def __init__(self, name: str, fd: int, owner: bool, read_only: bool = False) -> None:
        super().__init__(name, fd, owner, read_only)
        sections = sections_of(self.bytes)
        self.rules: Any = sections["rule_stats"]
        self.outputs: Any = sections["output_stats"]
        self.health: Any = sections["health"][0]
        self.streams: Any = sections["streams"]
        self.pids: Any = sections["pids"].reshape(layout.STREAMS_MAX, layout.PIDS_MAX)
        self.protections: Any = sections["protections"]
        self.journal: Any = sections["journal"][0]

    @classmethod
    def create(cls, core: int, instance: str | None, uid: int, gid: int) -> Self:
        """Create, allocate and hand over to the worker's user.

        Raises OSError when /dev/shm has no room, posix_ipc.ExistentialError when the name is taken.
        """
        name = segment_name(core, instance)
        shm = posix_ipc.SharedMemory(f"/{name}", posix_ipc.O_CREX, mode=0o600)
        try:
            os.posix_fallocate(shm.fd, 0, layout.STATS_BYTES)
            hand_over(shm.fd, uid, gid)
        except OSError:
            posix_ipc.unlink_shared_memory(f"/{name}")
            raise
        segment = cls(name, shm.fd, owner=True)
        segment.header["magic"] = layout.STATS_MAGIC
        segment.header["core"] = core
        segment.header["protections_offset"] = layout.STATS_PROTECTIONS_OFFSET
        segment.header["protection_bytes"] = layout.PROTECTION.itemsize
        return segment
