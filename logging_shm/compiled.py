"""The writer: one record into a ring, from compiled code. No allocation, lock or system call.

A segment has one writing thread. It fills the record behind its cursor and publishes it with a release store
of the state, then moves the cursor. A full ring refuses the record and counts it.
"""

from typing import Any

from numba import njit, types

from logging_shm.atomics import (
    int64,
    load_acquire_i64,
    load_acquire_u32,
    load_i64,
    store_i64,
    store_release_i64,
    store_release_u8,
    store_u8,
    store_u16,
    store_u32,
)
from logging_shm.atomics import load_u8 as _load_u8
from logging_shm.atomics import load_u32 as _load_u32
from logging_shm.layout import (
    HEADER,
    MESSAGE_BYTES_MAX,
    PAIR_KEY_OFFSET,
    PAIR_VALUE_BYTES_MAX,
    PAIR_VALUE_OFFSET,
    RECORD,
    RECORD_BYTES,
    RECORDS_OFFSET,
    STATE_READY,
    STATE_WRITING,
    offset_of,
)

CLOCK_MONOTONIC = 1
clock_gettime: Any = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.intp))

CAPACITY = offset_of(HEADER, "capacity")
FACILITY = offset_of(HEADER, "facility")
CORE = offset_of(HEADER, "core")
OWNER_PID = offset_of(HEADER, "owner_pid")
THREAD = offset_of(HEADER, "thread")
LEVEL_MASK = offset_of(HEADER, "level_mask")
WRITE_CURSOR = offset_of(HEADER, "write_cursor")
DROPPED = offset_of(HEADER, "dropped")
READ_CURSOR = offset_of(HEADER, "read_cursor")

SEVERITY = offset_of(RECORD, "severity")
RECORD_FACILITY = offset_of(RECORD, "facility")
MESSAGE_LENGTH = offset_of(RECORD, "message_length")
PAIR_COUNT = offset_of(RECORD, "pair_count")
RECORD_CORE = offset_of(RECORD, "core")
FORMAT = offset_of(RECORD, "format")
TIMESTAMP = offset_of(RECORD, "timestamp_ns")
SEQUENCE = offset_of(RECORD, "sequence")
PROCESS = offset_of(RECORD, "process")
RECORD_THREAD = offset_of(RECORD, "thread")
MESSAGE = offset_of(RECORD, "message")
PAIRS = offset_of(RECORD, "pairs")
KEY_RULE = int.from_bytes(b"rule", "little")


@njit(cache=True, nogil=True)
def enabled(segment: Any, severity: int) -> bool:
    """Whether records of this severity are wanted: one load and a branch."""
    return (int64(load_acquire_u32(segment.ctypes.data + LEVEL_MASK)) >> severity) & 1 != 0


@njit(cache=True, nogil=True)
def reserve(segment: Any, severity: int, timestamp_ns: int, format_number: int) -> int:
    """Begin a record; return its address, or 0 when filtered out or the ring is full."""
    base = segment.ctypes.data
    if not enabled(segment, severity):
        return 0
    cursor = load_i64(base + WRITE_CURSOR)
    capacity = load_i64(base + CAPACITY)
    if cursor - load_acquire_i64(base + READ_CURSOR) >= capacity:
        store_release_i64(base + DROPPED, load_i64(base + DROPPED) + 1)
        return 0
    record = base + RECORDS_OFFSET + (cursor % capacity) * RECORD_BYTES
    store_release_u8(record, STATE_WRITING)
    if timestamp_ns == 0:
        # The record's own message area takes the timespec: writing needs no memory besides the ring.
        clock_gettime(CLOCK_MONOTONIC, record + MESSAGE)
        timestamp_ns = load_i64(record + MESSAGE) * 1_000_000_000 + load_i64(record + MESSAGE + 8)
    store_u8(record + SEVERITY, severity)
    store_u8(record + RECORD_FACILITY, _load_u32(base + FACILITY))
    store_u8(record + PAIR_COUNT, 0)
    store_u8(record + MESSAGE_LENGTH, 0)
    store_u8(record + RECORD_CORE, _load_u32(base + CORE))
    store_u16(record + FORMAT, format_number)
    store_i64(record + TIMESTAMP, timestamp_ns)
    store_i64(record + SEQUENCE, cursor)
    store_u32(record + PROCESS, _load_u32(base + OWNER_PID))
    store_u32(record + RECORD_THREAD, _load_u32(base + THREAD))
    return record


@njit(cache=True, nogil=True)
def commit(segment: Any, record: int) -> None:
    """Publish a reserved record."""
    base = segment.ctypes.data
    store_release_u8(record, STATE_READY)
    store_release_i64(base + WRITE_CURSOR, load_i64(base + WRITE_CURSOR) + 1)


@njit(cache=True, nogil=True)
def write_event(
    segment: Any,
    severity: int,
    format_number: int,
    timestamp_ns: int,
    a0: int,
    a1: int,
    a2: int,
    a3: int,
    a4: int,
    a5: int,
    value: Any,
    value_length: int,
) -> bool:
    """Write six typed arguments under a registered format; False when filtered out or dropped.

    `segment` and `value` are uint8 arrays. A `value_length` over 0 adds the pair `rule` with the first
    20 bytes of `value`. `timestamp_ns` 0 reads CLOCK_MONOTONIC.
    """
    record = reserve(segment, severity, timestamp_ns, format_number)
    if record == 0:
        return False
    arguments = record + MESSAGE
    store_i64(arguments, a0)
    store_i64(arguments + 8, a1)
    store_i64(arguments + 16, a2)
    store_i64(arguments + 24, a3)
    store_i64(arguments + 32, a4)
    store_i64(arguments + 40, a5)
    store_u8(record + MESSAGE_LENGTH, 48)
    if value_length > 0:
        length = min(value_length, PAIR_VALUE_BYTES_MAX)
        pair = record + PAIRS
        store_u8(pair, 4)
        store_u8(pair + 1, length)
        store_i64(pair + PAIR_KEY_OFFSET, KEY_RULE)
        for i in range(length):
            store_u8(pair + PAIR_VALUE_OFFSET + i, value[i])
        store_u8(record + PAIR_COUNT, 1)
    commit(segment, record)
    return True


@njit(cache=True, nogil=True)
def write_text(segment: Any, severity: int, timestamp_ns: int, message: Any, length: int) -> bool:
    """Write `length` bytes (at most 160) of the uint8 array `message`; False when filtered or dropped."""
    record = reserve(segment, severity, timestamp_ns, 0)
    if record == 0:
        return False
    length = min(length, MESSAGE_BYTES_MAX)
    source = message.ctypes.data
    for i in range(length):
        store_u8(record + MESSAGE + i, _load_u8(source + i))
    store_u8(record + MESSAGE_LENGTH, length)
    commit(segment, record)
    return True
