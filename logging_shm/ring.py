"""The ring of one segment, one writer and one reader: how Python writes a record and how it is read back.

The reader checks every field: whatever a writer that went wrong left there becomes a harmless entry.
"""

import struct
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from logging_shm.facility import RING_CAPACITY, Facility, Severity
from logging_shm.layout import (
    ARGUMENTS_MAX,
    HEADER,
    MESSAGE_BYTES_MAX,
    PAIR_KEY_BYTES_MAX,
    PAIR_VALUE_BYTES_MAX,
    PAIRS_MAX,
    RECORD,
    RECORD_BYTES,
    RECORDS_OFFSET,
    STATE_READY,
    STATE_WRITING,
    offset_of,
)
from logging_shm.render import printable, render
from logging_shm.segment import Segment, SegmentError

_HEAD = struct.Struct("<BBBBBBHqqII")  # the first 32 bytes of RECORD
_PAIR = struct.Struct(f"<BBxx{PAIR_KEY_BYTES_MAX}s{PAIR_VALUE_BYTES_MAX}s")
_ARGUMENTS = struct.Struct(f"<{ARGUMENTS_MAX}q")
_I64 = struct.Struct("<q")
_WRITE_CURSOR = offset_of(HEADER, "write_cursor")
_READ_CURSOR = offset_of(HEADER, "read_cursor")
_DROPPED = offset_of(HEADER, "dropped")
_MESSAGE = offset_of(RECORD, "message")
_PAIRS = offset_of(RECORD, "pairs")
CUT_MARK = "…"


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


def encode_message(message: str) -> bytes:
    """UTF-8 of at most 160 bytes; a longer text is cut at a character and marked."""
    encoded = message.encode()
    if len(encoded) <= MESSAGE_BYTES_MAX:
        return encoded
    mark = CUT_MARK.encode()
    return encoded[: MESSAGE_BYTES_MAX - len(mark)].decode(errors="ignore").encode() + mark


class SharedSPSCRingBuffer:
    """One writer, one reader; both sides in Python here, the writer's twin in compiled.py."""

    def __init__(self, segment: Segment) -> None:
        """Raises SegmentError for a header that no creator wrote."""
        self.segment = segment
        self._memory = memoryview(segment.bytes)
        self._capacity = int(segment.header["capacity"])
        if self._capacity < 1 or int(segment.header["facility"]) not in Facility.__members__.values():
            raise SegmentError(f"/dev/shm/{segment.name} has a damaged header")
        self.facility = Facility(int(segment.header["facility"]))
        self.core = int(segment.header["core"])
        self._lock = threading.Lock()
        self.dropped_seen = 0

    @classmethod
    def create(cls, name: str, capacity: int | None = None, facility: Facility = Facility.Test, **segment: Any) -> Self:
        """Create the segment `name`. Raises SegmentError, see Segment.create."""
        return cls(Segment.create(name, facility, capacity or RING_CAPACITY[facility], **segment))

    @classmethod
    def attach(cls, name: str) -> Self:
        """Use the existing segment `name`. Raises SegmentError."""
        return cls(Segment.attach(name))

    def write(self, entry: LogEntry) -> bool:
        """Write one record; False when its level is off, or the ring is full, which is counted."""
        memory = self._memory
        if not int(self.segment.header["level_mask"]) >> entry.severity & 1:
            return False
        message = encode_message(entry.message)
        with self._lock:
            (cursor,) = _I64.unpack_from(memory, _WRITE_CURSOR)
            (read,) = _I64.unpack_from(memory, _READ_CURSOR)
            if cursor - read >= self._capacity:
                (dropped,) = _I64.unpack_from(memory, _DROPPED)
                _I64.pack_into(memory, _DROPPED, dropped + 1)
                return False
            at = RECORDS_OFFSET + cursor % self._capacity * RECORD_BYTES
            _HEAD.pack_into(
                memory,
                at,
                STATE_WRITING,
                entry.severity,
                self.facility,
                len(message),
                min(len(entry.pairs), PAIRS_MAX),
                self.core,
                0,
                entry.timestamp_ns,
                cursor,
                entry.process,
                entry.thread & 0xFFFFFFFF,
            )
            memory[at + _MESSAGE : at + _MESSAGE + len(message)] = message
            for i, (key, value) in enumerate(entry.pairs[:PAIRS_MAX]):
                k, v = key.encode()[:PAIR_KEY_BYTES_MAX], value.encode()[:PAIR_VALUE_BYTES_MAX]
                _PAIR.pack_into(memory, at + _PAIRS + i * _PAIR.size, len(k), len(v), k, v)
            memory[at] = STATE_READY
            _I64.pack_into(memory, _WRITE_CURSOR, cursor + 1)
        return True

    def read(self) -> LogEntry | None:
        """The next record, None when there is none. A record that was never finished is passed over."""
        memory = self._memory
        (written,) = _I64.unpack_from(memory, _WRITE_CURSOR)
        (cursor,) = _I64.unpack_from(memory, _READ_CURSOR)
        if not cursor < written <= cursor + self._capacity:
            return None
        at = RECORDS_OFFSET + cursor % self._capacity * RECORD_BYTES
        entry = self.decode(bytes(memory[at : at + RECORD_BYTES]))
        _I64.pack_into(memory, _READ_CURSOR, cursor + 1)
        return entry

    def last(self, count: int) -> list[LogEntry]:
        """The last `count` records, read before or not, oldest first. Takes nothing from the ring."""
        (written,) = _I64.unpack_from(self._memory, _WRITE_CURSOR)
        count = max(min(count, written, self._capacity), 0)
        entries = []
        for number in range(written - count, written):
            at = RECORDS_OFFSET + number % self._capacity * RECORD_BYTES
            entries.append(self.decode(bytes(self._memory[at : at + RECORD_BYTES])))
        return entries

    def dropped(self) -> int:
        """Records refused since the last call."""
        (total,) = _I64.unpack_from(self._memory, _DROPPED)
        seen, self.dropped_seen = self.dropped_seen, int(total)
        return max(self.dropped_seen - seen, 0)

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
            text = render(self.segment.format(number), number, _ARGUMENTS.unpack_from(record, _MESSAGE), dict(pairs))
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

    def shutdown(self) -> None:
        """Unlink the segment if this process created it."""
        self.segment.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()
