"""What the tests of the reading side share: records of any bytes, lines of every format, waiting with a deadline."""

import struct
import time
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from logging_shm import Facility, LogEntry, Reader, Severity, SharedSPSCRingBuffer
from logging_shm.layout import CORE_NONE, RECORD, RECORD_BYTES, RECORDS_OFFSET, STATE_READY
from logging_shm.lines import Batch
from logging_shm.sinks.base import Formatter, messages
from logging_shm.sinks.selection import Selection

MakeRing = Callable[..., SharedSPSCRingBuffer]
SHARED_FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
HOST = "host"
MIN_I64, MAX_I64 = -(1 << 63), (1 << 63) - 1
int64s = st.integers(MIN_I64, MAX_I64)
DEADLINE_S = 20


def record(
    message: bytes = b"",
    pairs: Sequence[tuple[bytes, bytes]] = (),
    severity: int = Severity.Info,
    number: int = 0,
    core: int = CORE_NONE,
    timestamp_ns: int = 0,
    process: int = 0,
    thread: int = 0,
) -> bytes:
    """The 256 bytes of a record, with format `number`."""
    first = struct.pack("<BBBBBBH", STATE_READY, severity, 0, len(message), len(pairs), core, number)
    head = first + struct.pack("<qqII", timestamp_ns, 0, process, thread)
    tail = b"".join(struct.pack("<BBxx8s20s", len(key), len(value), key, value) for key, value in pairs)
    return (head + message.ljust(160, b"\0") + tail).ljust(RECORD_BYTES, b"\0")


def put(ring: SharedSPSCRingBuffer, raw: bytes, state: int = STATE_READY) -> None:
    """Make 256 bytes the ring's next record: only state and sequence are put right."""
    number = ring.segment.get("write_cursor")
    at = record_at(ring, number)
    memory = ring.segment.memory
    memory[at : at + RECORD_BYTES] = raw
    RECORD.set(memoryview(memory)[at:], "state", state)
    RECORD.set(memoryview(memory)[at:], "sequence", number)
    ring.segment.set("write_cursor", number + 1)


def record_at(ring: SharedSPSCRingBuffer, number: int) -> int:
    """Where record `number` lies in the segment."""
    return RECORDS_OFFSET + (number & (ring.capacity - 1)) * RECORD_BYTES


def write(
    ring: SharedSPSCRingBuffer, message: str, timestamp_ns: int = 0, severity: Severity = Severity.Info, **fields: Any
) -> bool:
    """Write one text record as any program does."""
    return ring.write(LogEntry(severity, Facility.Test, message, timestamp_ns=timestamp_ns, **fields))


def lines(batch: Batch, kind: str = "text", **selection: Any) -> list[str]:
    """A batch as a sink of that format gets it."""
    formatter = Formatter(kind, Selection(host=HOST, **selection))
    return [line.decode() for chunk in formatter.chunks(batch, 0) for line in messages(chunk)]


def read(reader: Reader, everything: bool = True) -> list[str]:
    """What the next batch says, reports included."""
    batch = reader.read(everything)
    return [reader.entry(batch, index).message for index in range(len(batch.records))]


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for a state; fail when it doesn't come."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {DEADLINE_S} s: {what}"
        time.sleep(0.001)
