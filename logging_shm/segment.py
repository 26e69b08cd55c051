"""Segments: creating, mapping and removing the shared memory of one ring.

The creator owns the name and unlinks it; an attached process only maps it. A segment is stale when neither its
creator nor its writer runs: the pid is gone, or is that of a process with another start time. NumPy is not needed
here: `mcrlog` lists and cleans without it.
"""

import contextlib
import ctypes
import mmap
import os
import re
import stat
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import posix_ipc

from logging_shm.facility import Facility, Severity
from logging_shm.layout import (
    ABI_VERSION,
    CAPACITY_MAX,
    CORE_NONE,
    FLAG_OVERWRITE,
    FORMAT_BYTES_MAX,
    FORMATS_MAX,
    FORMATS_OFFSET,
    HEADER,
    LEVEL_MASK_ALL,
    LIMIT,
    RECORD,
    RECORD_BYTES,
    RECORDS_OFFSET,
    SEGMENT_MAGIC,
    STATE_READY,
    STATE_WRITING,
    segment_bytes,
)
from logging_shm.render import printable

SHM_DIRECTORY = Path("/dev/shm")
NAME = re.compile(r"mcr_[A-Za-z0-9_.-]{1,200}")
MADV_POPULATE_WRITE = 23  # linux/mman.h, since 5.14
OTHERS = 0o077  # mode bits of anybody but the owner
SEGMENT_BYTES_MAX = segment_bytes(CAPACITY_MAX)
COUNT_MAX = (1 << 63) - 1  # of a header's field: a writer that went wrong may leave any number there
CHUNK_BYTES = 1 << 20


class SegmentError(Exception):
    """A segment that can't be created, or that is none of ours."""


class OtherVersionError(SegmentError):
    """A segment of another ABI version: nothing in it but its magic and version can be read."""


def process_start_ticks(pid: int) -> int | None:
    """The start time of a process in clock ticks since boot (proc(5), stat field 22), None when gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()  # a process may be called anything, also what is no UTF-8
    except OSError:
        return None
    fields = text.rpartition(b")")[2].split()
    return None if fields[0] in b"ZX" else int(fields[19])


def is_running(pid: int, start_ticks: int) -> bool:
    """Whether a process runs that is the one meant; a reused pid is told by its start time."""
    return pid > 0 and process_start_ticks(pid) == start_ticks


def names() -> list[str]:
    """The names in /dev/shm that may be log segments."""
    return sorted(entry.name for entry in SHM_DIRECTORY.iterdir() if NAME.fullmatch(entry.name))


def identity_of(name: str) -> int | None:
    """What tells the file that has a name now from another that gets it later (Segment.identity); None for no file."""
    try:
        return (SHM_DIRECTORY / name).lstat().st_ino
    except OSError:
        return None


def unlink(name: str) -> None:
    """Remove a name; whoever maps the segment keeps its memory. One that is gone already is fine."""
    with contextlib.suppress(posix_ipc.ExistentialError):
        posix_ipc.unlink_shared_memory(f"/{name}")


def hand_over(fd: int, uid: int, gid: int) -> None:
    """Give a file to a user and group, -1 for no change. Raises OSError.

    Nothing is asked of the kernel where nothing changes: a service may be forbidden to change owners at all.
    """
    status = os.fstat(fd)
    if (uid, gid) != (-1, -1) and (uid, gid) != (status.st_uid, status.st_gid):
        os.fchown(fd, uid, gid)


def copy_of_header(fd: int) -> mmap.mmap:
    """What stands before the records, in memory of its own; zeros where the file has less. Raises OSError."""
    memory = mmap.mmap(-1, RECORDS_OFFSET)
    header = os.pread(fd, RECORDS_OFFSET, 0)
    memory[: len(header)] = header
    return memory


class Segment:
    """A mapped segment; a context manager. `memory` is the mapping, `bytes` the same as a NumPy array."""

    def __init__(self, name: str, fd: int, owner: bool, header_only: bool = False) -> None:
        """Map `fd`, or a copy of its header, and close it.

        Raises SegmentError when it is too small for a header, or larger than any ring.
        """
        self.name = name
        self._owner = owner
        try:
            status = os.fstat(fd)
            self.size = status.st_size
            self.identity = status.st_ino  # tells it from another one that has the name later
            if self.size < segment_bytes(0):
                raise SegmentError(f"/dev/shm/{name} is truncated: {self.size} bytes")
            if self.size > SEGMENT_BYTES_MAX:  # a file with holes may have any size
                raise SegmentError(f"/dev/shm/{name} is no log segment: {self.size} bytes")
            self.memory = copy_of_header(fd) if header_only else mmap.mmap(fd, self.size)
        except OSError as error:
            raise SegmentError(f"/dev/shm/{name}: mmap: {error.strerror}") from error
        finally:
            os.close(fd)

    @classmethod
    def create(
        cls,
        name: str,
        facility: Facility,
        capacity: int,
        core: int | None = None,
        formats: Mapping[int, str] | None = None,
        uid: int = -1,
        gid: int = -1,
        overwrite: bool = False,
        lock_memory: bool = False,
        instance: str | None = None,
    ) -> Self:
        """Create a segment with every page present, and hand it to `uid`:`gid`.

        `capacity` is a power of two, in records. With `overwrite` a full ring keeps the newest records, else the
        oldest. With `lock_memory` its pages are never swapped out (mlock(2)). `instance` is kept in the header.

        Raises ValueError for a capacity or format that can't be; SegmentError when the name belongs to a
        living process or is no segment, when /dev/shm has no room, or RLIMIT_MEMLOCK is too low.
        """
        if not 0 < capacity <= CAPACITY_MAX or capacity & (capacity - 1):
            raise ValueError(f"capacity {capacity}: expected a power of two up to {CAPACITY_MAX}")
        remove_stale(name, uid)
        try:
            shm = posix_ipc.SharedMemory(f"/{name}", posix_ipc.O_CREX, mode=0o600)
        except posix_ipc.ExistentialError as error:
            raise SegmentError(
                f"/dev/shm/{name} exists and is no log segment of version {ABI_VERSION}: "
                "remove it, or choose another instance"
            ) from error
        except (posix_ipc.Error, OSError, ValueError) as error:
            raise SegmentError(f"/dev/shm/{name}: {error}") from error
        try:
            os.posix_fallocate(shm.fd, 0, segment_bytes(capacity))
            hand_over(shm.fd, uid, gid)
        except OSError as error:
            os.close(shm.fd)
            unlink(name)
            raise SegmentError(
                f"/dev/shm/{name}: {error.strerror}: {segment_bytes(capacity)} bytes are needed, make room in /dev/shm"
            ) from error
        segment = cls(name, shm.fd, owner=True)
        try:
            segment._fill_header(facility, capacity, CORE_NONE if core is None else core & 0xFF, overwrite)
            segment._set_instance(instance or "")
            segment._keep(facility, capacity)
            for number, text in (formats or {}).items():
                segment.register(number, text)
            segment.claim()
            if lock_memory:
                segment._lock()
        except BaseException:
            segment.close()
            raise
        segment.set("magic", SEGMENT_MAGIC)
        return segment

    @classmethod
    def attach(cls, name: str, owners: Collection[int] | None = None, header_only: bool = False) -> Self:
        """Map an existing segment; with `owners`, only one that belongs to one of these user ids.

        Whoever owns a segment may truncate it, upon which reading it ends in SIGBUS: a service says whom it trusts, and
        lives on after `truncation.survive_truncation`. With `header_only` nothing of it is mapped: there is a copy of
        the header as it is now, and no record.

        Raises SegmentError when there is none, when others than its owner may write it, or it is not one of ours;
        OtherVersionError when it has another ABI version.
        """
        try:
            shm = posix_ipc.SharedMemory(f"/{name}")
        except (posix_ipc.Error, OSError, ValueError) as error:
            raise SegmentError(f"/dev/shm/{name}: {error}") from error
        status = os.fstat(shm.fd)
        if status.st_mode & OTHERS:
            os.close(shm.fd)
            mode = f"{status.st_mode & 0o777:04o}"
            raise SegmentError(f"/dev/shm/{name} has mode {mode}: segments have 0600, this is none of ours")
        if owners is not None and status.st_uid not in owners:
            os.close(shm.fd)
            raise SegmentError(
                f"/dev/shm/{name} belongs to user id {status.st_uid}, not to {sorted(owners)}: remove it"
            )
        segment = cls(name, shm.fd, owner=False, header_only=header_only)
        if segment.get("magic") != SEGMENT_MAGIC:
            raise SegmentError(f"/dev/shm/{name} is no log segment")
        version = segment.get("abi_version")
        if version != ABI_VERSION:
            raise OtherVersionError(f"/dev/shm/{name} has log version {version}, this program reads {ABI_VERSION}")
        capacity, facility = segment.get("capacity"), segment.get("facility")
        if not 0 < capacity <= CAPACITY_MAX or capacity & (capacity - 1):
            raise SegmentError(f"/dev/shm/{name} has a damaged header: capacity {capacity}")
        if segment.size < segment_bytes(capacity):
            raise SegmentError(f"/dev/shm/{name} is truncated: {segment.size} bytes")
        if facility not in Facility.__members__.values():
            raise SegmentError(f"/dev/shm/{name} has a damaged header: facility {facility}")
        segment._keep(Facility(facility), capacity)
        return segment

    def _keep(self, facility: Facility, capacity: int) -> None:
        """Note what was checked: whoever else maps the segment may change its header at any time."""
        self.facility = facility
        self.capacity = capacity
        self.core = self.get("core") & 0xFF  # a record has one byte for it; a dead writer may have left any number
        self.overwrite = bool(self.get("flags") & FLAG_OVERWRITE)

    def _fill_header(self, facility: Facility, capacity: int, core: int, overwrite: bool) -> None:
        start_ticks = process_start_ticks(os.getpid()) or 0
        values = {
            "abi_version": ABI_VERSION,
            "record_bytes": RECORD_BYTES,
            "capacity": capacity,
            "facility": facility,
            "core": core,
            "creator": os.getpid(),
            "creator_start_ticks": start_ticks,
            "flags": FLAG_OVERWRITE if overwrite else 0,
            "realtime_offset_ns": time.time_ns() - time.monotonic_ns(),
            "level_mask": LEVEL_MASK_ALL,
            "record_head": STATE_READY | facility << 16 | core << 40,
        }
        for field, value in values.items():
            self.set(field, value)

    def _set_instance(self, instance: str) -> None:
        field = HEADER.fields["instance"]
        encoded = instance.encode()[: field.bytes].ljust(field.bytes, b"\0")
        self.memory[field.offset : field.offset + field.bytes] = encoded

    @property
    def instance(self) -> str:
        """The relay that the segment belongs to, as far as its name fits; empty for one without a name."""
        field = HEADER.fields["instance"]
        raw = self.memory[field.offset : field.offset + field.bytes]
        return printable(raw.rstrip(b"\0"))

    def _lock(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        view = (ctypes.c_char * self.size).from_buffer(self.memory)
        if libc.mlock(ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(self.size)):
            raise SegmentError(
                f"/dev/shm/{self.name}: mlock: {os.strerror(ctypes.get_errno())}: raise RLIMIT_MEMLOCK (ulimit -l)"
            )

    @property
    def bytes(self) -> Any:
        """The whole segment as a uint8 array, for compiled code."""
        import numpy as np

        return np.frombuffer(self.memory, np.uint8)

    def get(self, field: str, index: int = 0) -> int:
        """A field of the header."""
        return int(HEADER.get(self.memory, field, index))

    def set(self, field: str, value: int, index: int = 0) -> None:
        """Store a field of the header."""
        HEADER.set(self.memory, field, value, index)

    # --- the writer's side --------------------------------------------------------------------------

    def claim(self) -> None:
        """Become the writer, where a former one left off; no first use of the memory will fault.

        A record that a killed writer had finished but not counted is kept; one that it was writing is counted
        as unfinished, and its place is used again.
        """
        self.finish_dead()
        self.set("process", os.getpid())
        self.set("thread", os.getpid())
        self.set("process_start_ticks", process_start_ticks(os.getpid()) or 0)
        try:
            self.memory.madvise(MADV_POPULATE_WRITE)
        except OSError:
            for at in range(0, self.size, mmap.PAGESIZE):
                self.memory[at] = self.memory[at]

    def finish_dead(self) -> None:
        """Put the end of a ring in order whose writer was killed. Only for its successor, or when there is none."""
        cursor = self.get("write_cursor")
        at = RECORDS_OFFSET + (cursor & (self.capacity - 1)) * RECORD_BYTES
        record = memoryview(self.memory)[at : at + RECORD_BYTES]
        state = RECORD.get(record, "state")
        if state == STATE_READY and RECORD.get(record, "sequence") == cursor:
            self.set("write_cursor", min(cursor + 1, COUNT_MAX))
        elif state == STATE_WRITING:
            RECORD.set(record, "state", 0)
            self.set("unfinished", min(self.get("unfinished") + 1, COUNT_MAX))

    def register(self, number: int, text: str) -> None:
        """Register a format under a number from 1 to 31. Raises ValueError for one that can't be."""
        encoded = text.encode()
        if not 0 < number < FORMATS_MAX:
            raise ValueError(f"format {number}: expected a number from 1 to {FORMATS_MAX - 1}")
        if not 0 < len(encoded) <= FORMAT_BYTES_MAX:
            raise ValueError(f"format {number}: {len(encoded)} bytes, expected 1 to {FORMAT_BYTES_MAX}")
        start = FORMATS_OFFSET + number * FORMAT_BYTES_MAX
        self.memory[start : start + FORMAT_BYTES_MAX] = encoded.ljust(FORMAT_BYTES_MAX, b"\0")
        self.set("formats_registered", self.get("formats_registered") + 1)

    def limit(self, number: int, per_second: float, burst: int = 1) -> None:
        """Let a format's records pass at most `burst` at once and `per_second` in the long run; 0 lifts the limit.

        Format 0 is text. What is suppressed is counted, and told by the reader.
        """
        if not 0 <= number < FORMATS_MAX or per_second < 0 or burst < 1:
            raise ValueError(f"limit of format {number}: {per_second} per second, burst {burst}")
        interval_ns = int(1e9 / per_second) if per_second else 0
        at = HEADER["limits"] + number * LIMIT.bytes
        bucket = memoryview(self.memory)[at : at + LIMIT.bytes]
        LIMIT.set(bucket, "burst_ns", interval_ns * (burst - 1))
        LIMIT.set(bucket, "interval_ns", interval_ns)

    @property
    def level(self) -> Severity:
        """The least grave severity that is written."""
        return Severity(max((self.get("level_mask") & LEVEL_MASK_ALL).bit_length() - 1, 0))

    @level.setter
    def level(self, severity: Severity) -> None:
        """Write records as grave as `severity` or graver, from the writer's next one on."""
        self.set("level_mask", (2 << severity) - 1)

    # --- the reader's side --------------------------------------------------------------------------

    def format(self, number: int) -> str | None:
        """The registered format, None when there is none."""
        if not 0 < number < FORMATS_MAX:
            return None
        start = FORMATS_OFFSET + number * FORMAT_BYTES_MAX
        text = self.memory[start : start + FORMAT_BYTES_MAX].rstrip(b"\0")
        return text.decode("utf-8", "replace") or None

    def suppressed(self, number: int) -> int:
        """How many records of a format its limit has suppressed since the segment was made."""
        at = HEADER["limits"] + number * LIMIT.bytes
        return int(LIMIT.get(memoryview(self.memory)[at : at + LIMIT.bytes], "suppressed"))

    def dropped(self) -> list[int]:
        """Records refused by the full ring since it was made, by severity."""
        return [self.get("dropped", severity) for severity in Severity]

    def writer_is_running(self) -> bool:
        """Whether the process that writes, still runs."""
        return is_running(self.get("process"), self.get("process_start_ticks"))

    def is_owned(self) -> bool:
        """Whether the segment's writer or its creator still runs."""
        return self.writer_is_running() or is_running(self.get("creator"), self.get("creator_start_ticks"))

    # --- the end ------------------------------------------------------------------------------------

    def close(self) -> None:
        """Unlink the name if this process made it; the mapping ends with its last view."""
        if self._owner:
            self._owner = False
            unlink(self.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def used_by(name: str) -> list[int]:
    """The processes that map a segment or hold it open. Raises SegmentError when the caller may not look at enough.

    Even root may be kept from looking at a process, as at a container's first; a relay's supervisor it always sees.
    """
    path = SHM_DIRECTORY / name
    mapping = b" " + os.fsencode(path)
    pids = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            is_mapped = any(line.endswith(mapping) for line in (process / "maps").read_bytes().splitlines())
            if is_mapped or any(descriptor.readlink() == path for descriptor in (process / "fd").iterdir()):
                pids.append(int(process.name))
        except PermissionError:
            # What a zombie had is closed, and its entries in /proc belong to root.
            if os.geteuid() and process_start_ticks(int(process.name)) is not None:
                raise SegmentError(
                    f"/dev/shm/{name} can't be read, and only root can tell whether it is in use: run as root"
                ) from None
        except OSError:  # it ended meanwhile
            continue
    return pids


def open_private(name: str, uid: int = -1) -> BinaryIO | None:
    """A file in /dev/shm as nobody but a log's processes makes them: regular, 0600, of root, the caller or `uid`."""
    path = SHM_DIRECTORY / name
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o777 != 0o600:
            return None
        if status.st_uid not in (0, os.geteuid(), uid):
            return None
        return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb")
    except OSError:
        return None


def is_zero(file: BinaryIO) -> bool:
    """Whether nothing but zeros follows."""
    return all(chunk.count(0) == len(chunk) for chunk in iter(lambda: file.read(CHUNK_BYTES), b""))


def is_remnant(name: str, uid: int = -1) -> bool:
    """Whether a file that can't be attached was made by a log, of root, the caller or `uid`.

    It is damaged, of another version, or its creator was killed before it wrote the magic: then it is empty, or has
    the size of a segment and no records.
    """
    file = open_private(name, uid)
    if file is None:
        return False
    with file:
        header = file.read(RECORDS_OFFSET)
        magic = int.from_bytes(header[:8], "little")
        if magic or not header:
            return magic == SEGMENT_MAGIC or not header
        size = os.fstat(file.fileno()).st_size
        capacity = max(size - RECORDS_OFFSET, 0) // RECORD_BYTES
        if not 0 < capacity <= CAPACITY_MAX or capacity & (capacity - 1) or size != segment_bytes(capacity):
            return False
        return (not any(header) or HEADER.get(header, "abi_version") == ABI_VERSION) and is_zero(file)


def owner_of(name: str, uid: int = -1) -> int | None:
    """The living process that a segment belongs to, None when it is stale. Raises SegmentError for another's file.

    Ours are root's, the caller's and those of `uid`. What can't be read but was made by a log, see is_remnant, belongs
    to whoever has it open.
    """
    try:
        segment = Segment.attach(name, {0, os.geteuid(), uid}, header_only=True)
    except SegmentError:
        if not is_remnant(name, uid):
            raise
    else:
        if segment.writer_is_running():
            return segment.get("process")
        return segment.get("creator") if segment.is_owned() else None
    # Not in the handler: there the exception's frames still have the segment, and this process may be found.
    return next(iter(used_by(name)), None)


def remove_stale(name: str, uid: int = -1) -> bool:
    """Remove a segment whose owner is gone; True when there was one. Raises SegmentError when it lives."""
    try:
        pid = owner_of(name, uid)
    except SegmentError:
        return False
    if pid is not None:
        raise SegmentError(
            f"/dev/shm/{name} belongs to process {pid}, which is running: stop it, or choose another --instance"
        )
    unlink(name)
    return True
