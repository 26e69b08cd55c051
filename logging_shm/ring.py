"""The ring of one segment, one writer and one reader: how Python writes a record and how it is read back.

Several threads of the writing process may write. The reader checks every field: whatever a writer that went wrong
left there becomes a harmless entry. The twins in compiled code are compiled.py and collect.py.
"""

import os
import struct
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from logging_shm.facility import RING_CAPACITY, Facility, Severity
from logging_shm.layout import (
    ARGUMENTS_MAX,
    HEADER,
    LIMIT,
    MESSAGE_BYTES_MAX,
    PAIR_KEY_BYTES_MAX,
    PAIR_VALUE_BYTES_MAX,
    PAIRS_MAX,
    RECORD,
    RECORD_BYTES,
    RECORDS_OFFSET,
    STATE_READY,
    STATE_WRITING,
)
from logging_shm.render import printable, render
from logging_shm.segment import Segment

_HEAD = struct.Struct("<BBBBBBHqqII")  # the first 32 bytes of RECORD
_PAIR = struct.Struct(f"<BBxx{PAIR_KEY_BYTES_MAX}s{PAIR_VALUE_BYTES_MAX}s")
_ARGUMENTS = struct.Struct(f"<{ARGUMENTS_MAX}q")
_WORD = 8
_LEVEL_MASK = HEADER["level_mask"]
_WRITE_CURSOR = HEADER["write_cursor"] // _WORD
_READ_CURSOR = HEADER["read_cursor"] // _WORD
_DROPPED = HEADER["dropped"] // _WORD
_TEXT_LIMIT = HEADER["limits"]  # format 0
_EARLIEST, _INTERVAL, _BURST, _SUPPRESSED = (
    (_TEXT_LIMIT + LIMIT[field]) // _WORD for field in ("earliest_ns", "interval_ns", "burst_ns", "suppressed")
)
_RECORDS = RECORDS_OFFSET // _WORD
_RECORD_WORDS = RECORD_BYTES // _WORD
_MESSAGE = RECORD["message"]
_PAIRS = RECORD["pairs"]
CUT_MARK = "…"
_CUT_MARK_BYTES = CUT_MARK.encode()


@dataclass(frozen=True)
class LogEntry:
    """A record as a reader sees it: printable text, known severity and facility."""

    severity: Severity
    facility: Facility
    message: str
    core: int = 0
    timestamp_ns: int = 0
    sequence: int = 0
    process: int = 0
    thread: int = 0
    pairs: tuple[tuple[str, str], ...] = ()


def cut(encoded: bytes) -> bytes:
    """UTF-8 of at most 160 bytes; a longer text is cut at a character and marked."""
    if len(encoded) <= MESSAGE_BYTES_MAX:
        return encoded
    return encoded[: MESSAGE_BYTES_MAX - len(_CUT_MARK_BYTES)].decode(errors="ignore").encode() + _CUT_MARK_BYTES


class _Identity(threading.local):
    """The calling thread's pid and kernel thread id as a record holds them; asked of the kernel once a thread."""

    def __init__(self) -> None:
        self.word = os.getpid() | threading.get_native_id() << 32


_identity = _Identity()


def _renew_identity() -> None:
    global _identity  # noqa: PLW0603 - a fork makes every cached identity wrong
    _identity = _Identity()


os.register_at_fork(after_in_child=_renew_identity)


class SharedSPSCRingBuffer:
    """One writing process, one reader; both sides in Python here."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.facility = segment.facility
        self.core = segment.core
        self.capacity = segment.capacity
        self.overwrite = segment.overwrite
        self._memory = memoryview(segment.memory)
        self._words = self._memory.cast("q")
        self._head = STATE_WRITING | self.facility << 16 | self.core << 40
        self._lock = threading.Lock()
        self._dropped_seen = 0
        self.missed = 0  # records that the writer overwrote before they were read

    @classmethod
    def create(cls, name: str, capacity: int | None = None, facility: Facility = Facility.Test, **segment: Any) -> Self:
        """Create the segment `name`. Raises SegmentError, see Segment.create."""
        return cls(Segment.create(name, facility, capacity or RING_CAPACITY[facility], **segment))

    @classmethod
    def attach(cls, name: str, owners: Collection[int] | None = None, header_only: bool = False) -> Self:
        """Use the existing segment `name`; with `header_only` no records. Raises SegmentError, see Segment.attach."""
        return cls(Segment.attach(name, owners, header_only))

    # --- the writer's side --------------------------------------------------------------------------

    def write(self, entry: LogEntry) -> bool:
        """Write one record; False when its level is off, or the ring is full, which is counted."""
        return self.append(
            entry.severity, entry.message, entry.pairs, entry.timestamp_ns, entry.process | entry.thread << 32
        )

    def append(
        self,
        severity: int,
        message: str,
        pairs: Sequence[tuple[str, str]] = (),
        timestamp_ns: int | None = None,
        process_and_thread: int | None = None,
    ) -> bool:
        """Write one text record, by default as of now and by this thread; False when it was not written.

        x86-64 keeps the order of these stores; nothing but the interpreter stands between them.
        """
        memory = self._memory
        if not memory[_LEVEL_MASK] >> severity & 1:
            return False
        encoded = message.encode("utf-8", "backslashreplace")
        if len(encoded) > MESSAGE_BYTES_MAX:
            encoded = cut(encoded)
        length = len(encoded)
        if process_and_thread is None:
            process_and_thread = _identity.word
        words = self._words
        with self._lock:
            cursor = words[_WRITE_CURSOR]
            if cursor - words[_READ_CURSOR] >= self.capacity and not self.overwrite:
                words[_DROPPED + severity] += 1
                return False
            if words[_INTERVAL]:
                timestamp_ns = time.monotonic_ns() if timestamp_ns is None else timestamp_ns
                if self._suppress(timestamp_ns):
                    return False
            place = cursor & (self.capacity - 1)
            at = RECORDS_OFFSET + place * RECORD_BYTES
            word = _RECORDS + place * _RECORD_WORDS
            head = self._head | severity << 8 | length << 24
            words[word] = head
            words[word + 1] = time.monotonic_ns() if timestamp_ns is None else timestamp_ns
            words[word + 2] = cursor
            words[word + 3] = process_and_thread
            memory[at + _MESSAGE : at + _MESSAGE + length] = encoded
            if pairs:
                head |= self._write_pairs(at + _PAIRS, pairs) << 32
            words[word] = head + (STATE_READY - STATE_WRITING)
            words[_WRITE_CURSOR] = cursor + 1
        return True

    def _suppress(self, now_ns: int) -> bool:
        """Whether the bucket of texts is empty; compiled.py's `suppress`."""
        words = self._words
        earliest_ns = words[_EARLIEST]
        if earliest_ns - now_ns > words[_BURST]:
            words[_SUPPRESSED] += 1
            return True
        words[_EARLIEST] = max(earliest_ns, now_ns) + words[_INTERVAL]
        return False

    def _write_pairs(self, at: int, pairs: Sequence[tuple[str, str]]) -> int:
        for i, (key, value) in enumerate(pairs[:PAIRS_MAX]):
            k = key.encode("utf-8", "backslashreplace")[:PAIR_KEY_BYTES_MAX]
            v = value.encode("utf-8", "backslashreplace")[:PAIR_VALUE_BYTES_MAX]
            _PAIR.pack_into(self._memory, at + i * _PAIR.size, len(k), len(v), k, v)
        return min(len(pairs), PAIRS_MAX)

    # --- the reader's side --------------------------------------------------------------------------

    def read(self) -> LogEntry | None:
        """The next record, None when there is none. Records that were overwritten are counted in `missed`.

        It passes over a ring's length of them at most: a cursor that runs away holds nobody.
        """
        for _ in range(self.capacity + 1):
            cursor, written = self._words[_READ_CURSOR], self._words[_WRITE_CURSOR]
            if cursor == written:
                return None
            if not cursor < written <= cursor + self.capacity:
                self.missed += 1 if written < cursor else written - self.capacity - cursor
                cursor = max(written - self.capacity, 0) if self.overwrite and written > cursor else written
            entry = self._copy(cursor)
            self._words[_READ_CURSOR] = cursor if cursor == written else cursor + 1
            if entry is not None:
                return entry
            if cursor == written:
                return None
            self.missed += 1
        return None

    def _copy(self, number: int) -> LogEntry | None:
        """Record `number`, None when it is not there, or was overwritten while it was copied."""
        at = RECORDS_OFFSET + (number & (self.capacity - 1)) * RECORD_BYTES
        record = self._memory[at : at + RECORD_BYTES].tobytes()
        head = (self._memory[at], RECORD.get(self._memory[at : at + RECORD_BYTES], "sequence"))
        if head != (STATE_READY, number) or RECORD.get(record, "sequence") != number:
            return None
        return self.decode(record)

    def unread(self) -> int:
        """Records that are written and not yet read."""
        return min(max(self._words[_WRITE_CURSOR] - self._words[_READ_CURSOR], 0), self.capacity)

    def last(self, count: int) -> list[LogEntry]:
        """The last `count` records, read before or not, oldest first. Takes nothing from the ring."""
        written = self._words[_WRITE_CURSOR]
        count = max(min(count, written, self.capacity), 0)
        return [entry for number in range(written - count, written) if (entry := self._copy(number))]

    def dropped(self) -> int:
        """Records refused since the last call."""
        total = sum(self.segment.dropped())
        seen, self._dropped_seen = self._dropped_seen, total
        return max(total - seen, 0)

    def decode(self, record: bytes) -> LogEntry:
        """An entry from the 256 bytes of a record, whatever they are."""
        _, severity, _, length, pair_count, core, number, timestamp, sequence, process, thread = _HEAD.unpack_from(
            record
        )
        pairs = []
        for i in range(min(pair_count, PAIRS_MAX)):
            key_length, value_length, key, value = _PAIR.unpack_from(record, _PAIRS + i * _PAIR.size)
            pairs.append((printable(key[:key_length]), printable(value[:value_length])))
        body = record[_MESSAGE : _MESSAGE + min(length, MESSAGE_BYTES_MAX)]
        if number:
            arguments = _ARGUMENTS.unpack_from(record, _MESSAGE)[: length // 8]
            text = render(self.segment.format(number), number, arguments, dict(pairs))
        else:
            text = printable(body)
        return LogEntry(
            severity=Severity(severity & 7),
            facility=self.facility,
            message=text,
            core=core,
            timestamp_ns=timestamp,
            sequence=sequence,
            process=process,
            thread=thread,
            pairs=tuple(pairs),
        )

    # --- the end ------------------------------------------------------------------------------------

    def shutdown(self) -> None:
        """Unlink the segment if this process created it."""
        self.segment.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()
