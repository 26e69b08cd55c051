"""The writer: one record into a ring, from compiled code. No allocation, lock or system call.

A segment has one writing thread. It fills the record behind its cursor between two states, WRITING and READY, so
that a reader which copies it meanwhile can tell; then it moves the cursor. A full ring refuses the record
and counts it, or, where the segment says so, overwrites the oldest.

    write_event(segment, severity, event, timestamp_ns, (1, 2.5))            # rendered as formats[event] says
    write_event_about(segment, severity, event, timestamp_ns, (1,), KEY, name, name_length)
    write_text(segment, severity, timestamp_ns, text, length)
"""

from typing import Any

from numba import types

from logging_shm.atomics import (
    base_of,
    copy_bytes,
    fence_release,
    int64,
    load_acquire_i64,
    load_acquire_u32,
    load_i64,
    load_u32,
    prefetch_write,
    store_arguments,
    store_i64,
    store_release_i64,
    store_release_u8,
    store_u8,
)
from logging_shm.jit import compiled
from logging_shm.layout import (
    FLAG_OVERWRITE,
    HEADER,
    LIMIT,
    MESSAGE_BYTES_MAX,
    PAIR,
    PAIR_VALUE_BYTES_MAX,
    RECORD,
    RECORD_BYTES,
    RECORDS_OFFSET,
    STATE_WRITING,
)

CLOCK_MONOTONIC = 1
clock_gettime: Any = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.intp))

CAPACITY = HEADER["capacity"]
PROCESS_AND_THREAD = HEADER["process"]
FLAGS = HEADER["flags"]
LEVEL_MASK = HEADER["level_mask"]
RECORD_HEAD = HEADER["record_head"]
WRITE_CURSOR = HEADER["write_cursor"]
READ_CURSOR_SEEN = HEADER["read_cursor_seen"]
DROPPED = HEADER["dropped"]
READ_CURSOR = HEADER["read_cursor"]
LIMITS = HEADER["limits"]
SCRATCH = HEADER["scratch"]
LIMIT_BYTES = LIMIT.bytes
EARLIEST = LIMIT["earliest_ns"]
INTERVAL = LIMIT["interval_ns"]
BURST = LIMIT["burst_ns"]
SUPPRESSED = LIMIT["suppressed"]

SEVERITY_SHIFT = 8 * RECORD["severity"]
MESSAGE_LENGTH_SHIFT = 8 * RECORD["message_length"]
PAIR_COUNT_SHIFT = 8 * RECORD["pair_count"]
FORMAT_SHIFT = 8 * RECORD["format"]
TIMESTAMP = RECORD["timestamp_ns"]
SEQUENCE = RECORD["sequence"]
RECORD_PROCESS_AND_THREAD = RECORD["process"]
MESSAGE = RECORD["message"]
PAIRS = RECORD["pairs"]
KEY_LENGTH = PAIR["key_length"]
VALUE_LENGTH = PAIR["value_length"]
KEY = PAIR["key"]
VALUE = PAIR["value"]
PREFETCH_RECORDS = 2  # ahead: the line is here when the next but one record comes, 60 ns later


@compiled(inline="always")
def enabled(segment: Any, severity: int) -> bool:
    """Whether records of this severity are wanted: one load and a branch."""
    return (int64(load_acquire_u32(base_of(segment) + LEVEL_MASK)) >> severity) & 1 != 0


@compiled
def refuse(base: int, severity: int) -> bool:
    """Whether the ring is full, as far as its reader has told. Counts the record that is refused then."""
    read = load_acquire_i64(base + READ_CURSOR)
    store_i64(base + READ_CURSOR_SEEN, read)
    if int64(load_i64(base + WRITE_CURSOR)) - int64(read) < load_i64(base + CAPACITY):
        return False
    if load_u32(base + FLAGS) & FLAG_OVERWRITE:
        # Room for a whole ring before this is asked again.
        store_i64(base + READ_CURSOR_SEEN, load_i64(base + WRITE_CURSOR))
        return False
    counter = base + DROPPED + 8 * severity
    store_release_i64(counter, load_i64(counter) + 1)
    return True


@compiled
def suppress(limit: int, now_ns: int) -> bool:
    """Whether a format's token bucket is empty, by the generic cell rate algorithm (ITU-T I.371)."""
    earliest_ns = load_i64(limit + EARLIEST)
    if earliest_ns - now_ns > load_i64(limit + BURST):
        store_i64(limit + SUPPRESSED, load_i64(limit + SUPPRESSED) + 1)
        return True
    store_i64(limit + EARLIEST, max(earliest_ns, now_ns) + load_i64(limit + INTERVAL))
    return False


@compiled(inline="always")
def reserve(base: int, severity: int, timestamp_ns: int, format_number: int) -> int:
    """Begin a record; return its address, or 0 when it is suppressed, or the ring is full."""
    cursor = int64(load_i64(base + WRITE_CURSOR))
    capacity = int64(load_i64(base + CAPACITY))
    if cursor - int64(load_i64(base + READ_CURSOR_SEEN)) >= capacity and refuse(base, severity):
        return 0
    record = base + RECORDS_OFFSET + (cursor & (capacity - 1)) * RECORD_BYTES
    limit = base + LIMITS + format_number * LIMIT_BYTES
    if timestamp_ns == 0:
        # The writer's own line takes the timespec: writing needs no memory besides the segment.
        clock_gettime(CLOCK_MONOTONIC, base + SCRATCH)
        timestamp_ns = int64(load_i64(base + SCRATCH)) * 1_000_000_000 + int64(load_i64(base + SCRATCH + 8))
    if load_i64(limit + INTERVAL) and suppress(limit, timestamp_ns):
        return 0
    store_release_u8(record, STATE_WRITING)
    fence_release()
    store_i64(record + TIMESTAMP, timestamp_ns)
    store_i64(record + SEQUENCE, cursor)
    store_i64(record + RECORD_PROCESS_AND_THREAD, load_i64(base + PROCESS_AND_THREAD))
    return record


@compiled(inline="always")
def commit(base: int, record: int, severity: int, format_number: int, length: int, pair_count: int) -> None:
    """Publish a reserved record: its first eight bytes at once, the cursor after them."""
    head = int64(load_i64(base + RECORD_HEAD)) | severity << SEVERITY_SHIFT | format_number << FORMAT_SHIFT
    head |= length << MESSAGE_LENGTH_SHIFT | pair_count << PAIR_COUNT_SHIFT
    store_release_i64(record, head)
    cursor = int64(load_i64(base + WRITE_CURSOR)) + 1
    store_release_i64(base + WRITE_CURSOR, cursor)
    ahead = (cursor + PREFETCH_RECORDS) & (int64(load_i64(base + CAPACITY)) - 1)
    prefetch_write(base + RECORDS_OFFSET + ahead * RECORD_BYTES)


@compiled
def write_enabled_event(base: int, severity: int, event: int, timestamp_ns: int, arguments: Any) -> bool:
    """`write_event` behind its level check."""
    record = reserve(base, severity, timestamp_ns, event)
    if record == 0:
        return False
    count = store_arguments(record + MESSAGE, arguments)
    commit(base, record, severity, event, 8 * count, 0)
    return True


@compiled
def write_enabled_event_about(
    base: int,
    severity: int,
    event: int,
    timestamp_ns: int,
    arguments: Any,
    key: Any,
    value: int,
    value_length: int,
) -> bool:
    """`write_event_about` behind its level check."""
    record = reserve(base, severity, timestamp_ns, event)
    if record == 0:
        return False
    count = store_arguments(record + MESSAGE, arguments)
    length = min(int64(value_length), PAIR_VALUE_BYTES_MAX)
    pair = record + PAIRS
    store_u8(pair + KEY_LENGTH, key[1])
    store_u8(pair + VALUE_LENGTH, length)
    store_i64(pair + KEY, key[0])
    copy_bytes(pair + VALUE, value, length)
    commit(base, record, severity, event, 8 * count, 1)
    return True


@compiled
def write_enabled_text(base: int, severity: int, timestamp_ns: int, message: int, length: int) -> bool:
    """`write_text` behind its level check."""
    record = reserve(base, severity, timestamp_ns, 0)
    if record == 0:
        return False
    length = min(int64(length), MESSAGE_BYTES_MAX)
    copy_bytes(record + MESSAGE, message, length)
    commit(base, record, severity, 0, length, 0)
    return True


# What callers use: the level check stands in their own code, so that a record that is off costs no call.


@compiled(inline="always")
def write_event(segment: Any, severity: int, event: int, timestamp_ns: int, arguments: Any) -> bool:
    """Write a tuple of at most 8 integers and floats under the format `event`; False when it was not written.

    `segment` is the uint8 array of the segment, or its address. `timestamp_ns` 0 reads CLOCK_MONOTONIC.
    """
    if not enabled(segment, severity):
        return False
    return write_enabled_event(base_of(segment), severity, event, timestamp_ns, arguments)


@compiled(inline="always")
def write_event_about(
    segment: Any,
    severity: int,
    event: int,
    timestamp_ns: int,
    arguments: Any,
    key: Any,
    value: Any,
    value_length: int,
) -> bool:
    """As `write_event`, with a pair: `key` from pair_key(), and up to 20 bytes of `value`, an array or its address."""
    if not enabled(segment, severity):
        return False
    return write_enabled_event_about(
        base_of(segment), severity, event, timestamp_ns, arguments, key, base_of(value), value_length
    )


@compiled(inline="always")
def write_text(segment: Any, severity: int, timestamp_ns: int, message: Any, length: int) -> bool:
    """Write `length` bytes (at most 160) of `message`, an array or its address; False when it was not written."""
    if not enabled(segment, severity):
        return False
    return write_enabled_text(base_of(segment), severity, timestamp_ns, base_of(message), length)
