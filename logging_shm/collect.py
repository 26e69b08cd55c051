"""Collecting: records of many rings into one batch, merged by time, in compiled code that releases the GIL.

The reader's side of compiled.py. It trusts nothing: cursors, states and lengths are checked, and each record is
copied before it is looked at, then looked at again for whether the writer came by meanwhile.
"""

from typing import Any

import numpy as np

from logging_shm.atomics import (
    copy_bytes,
    fence_acquire,
    int64,
    load_acquire_i64,
    load_acquire_u8,
    load_i64,
    load_u8,
    store_release_i64,
    store_u8,
)
from logging_shm.jit import compiled
from logging_shm.layout import (
    CACHE_LINE_BYTES,
    HEADER,
    MESSAGE_BYTES_MAX,
    PAIRS_MAX,
    RECORD,
    RECORD_BYTES,
    RECORDS_OFFSET,
    STATE_READY,
)

# One ring as its reader knows it: nothing here is read from the segment again.
SOURCE = np.dtype(
    [
        ("base", "<i8"),  # address of the segment
        ("capacity", "<i8"),
        ("cursor", "<i8"),  # the next record to read
        ("end", "<i8"),  # behind the last that this pass may read; at first the cursor
        ("newest_ns", "<i8"),  # the youngest timestamp that this pass may read
        ("future_ns", "<i8"),  # a timestamp beyond is nonsense
        ("head_ns", "<i8"),  # timestamp of the next
        ("facility", "<i8"),
        ("overwrite", "<i8"),
        ("consume", "<i8"),  # tell the writer what was read
        ("missed", "<i8"),  # overwritten before they were read
        ("damaged", "<i8"),  # neither whole nor overwritten: the writer went wrong
    ]
)
NEVER_NS = np.iinfo(np.int64).max

WRITE_CURSOR = HEADER["write_cursor"]
READ_CURSOR = HEADER["read_cursor"]
SEVERITY = RECORD["severity"]
FACILITY = RECORD["facility"]
MESSAGE_LENGTH = RECORD["message_length"]
PAIR_COUNT = RECORD["pair_count"]
TIMESTAMP = RECORD["timestamp_ns"]
SEQUENCE = RECORD["sequence"]
PAIRS = RECORD["pairs"]
SEVERITY_MAX = 7
MESSAGE_IN_FIRST_LINE = CACHE_LINE_BYTES - RECORD["message"]


@compiled
def record_address(source: Any, number: int) -> int:
    """Where record `number` of a ring lies."""
    return source.base + RECORDS_OFFSET + (number & (source.capacity - 1)) * RECORD_BYTES


@compiled
def look(source: Any, newest_ns: int, future_ns: int) -> None:
    """Begin a pass: find out how far it may read, and put a cursor right that lies outside the ring."""
    written = int64(load_acquire_i64(source.base + WRITE_CURSOR))
    if written < source.cursor:
        source.damaged += 1
        source.cursor = written
    behind = written - source.cursor
    if behind < 0 or behind > source.capacity:  # below 0: more than 63 bits hold
        if behind > 0 and (source.overwrite or not source.consume):
            source.missed += behind - source.capacity
        else:
            source.damaged += 1
        source.cursor = written - source.capacity
    source.end = written
    source.newest_ns = newest_ns
    source.future_ns = future_ns


@compiled
def peek(source: Any) -> None:
    """Note the timestamp of the next record; NEVER_NS when there is none, or it is too young to be merged yet."""
    source.head_ns = NEVER_NS
    if source.cursor < source.end:
        head_ns = load_i64(record_address(source, source.cursor) + TIMESTAMP)
        # A timestamp far in the future is nonsense: it must not hold its ring up.
        if not source.newest_ns < head_ns <= source.future_ns:
            source.head_ns = min(head_ns, NEVER_NS - 1)


@compiled
def take(source: Any, target: int) -> bool:
    """Copy the next record to the address `target` and step on; False when it was not whole."""
    number = source.cursor
    source.cursor = number + 1
    record = record_address(source, number)
    if load_acquire_u8(record) != STATE_READY or load_i64(record + SEQUENCE) != number:
        return not_whole(source, number)
    copy_bytes(target, record, CACHE_LINE_BYTES)
    length = min(int64(load_u8(target + MESSAGE_LENGTH)), MESSAGE_BYTES_MAX)
    pair_count = min(int64(load_u8(target + PAIR_COUNT)), PAIRS_MAX)
    if length > MESSAGE_IN_FIRST_LINE:
        copy_bytes(target + CACHE_LINE_BYTES, record + CACHE_LINE_BYTES, PAIRS - CACHE_LINE_BYTES)
    if pair_count:
        copy_bytes(target + PAIRS, record + PAIRS, RECORD_BYTES - PAIRS)
    fence_acquire()
    if load_u8(record) != STATE_READY or load_i64(record + SEQUENCE) != number:
        return not_whole(source, number)
    store_u8(target + SEVERITY, load_u8(target + SEVERITY) & SEVERITY_MAX)
    store_u8(target + FACILITY, source.facility)
    store_u8(target + MESSAGE_LENGTH, length)
    store_u8(target + PAIR_COUNT, pair_count)
    return True


@compiled
def not_whole(source: Any, number: int) -> bool:
    """Count a record that was overwritten under the reader's eyes, or never was one. Returns False."""
    if int64(load_acquire_i64(source.base + WRITE_CURSOR)) - number >= source.capacity:
        source.missed += 1
    else:
        source.damaged += 1
    return False


@compiled
def collect(sources: Any, records: Any, origins: Any, newest_ns: int, future_ns: int) -> int:
    """Fill a batch with the oldest records of all rings, in timestamp order; return their number.

    `sources`: SOURCE[n]. `records`: u1[m, 256]. `origins`: i4[m], the index of each record's ring. Records younger
    than `newest_ns` stay, so that a slower writer's older ones come first, unless they are beyond `future_ns`.

    A pass reads what all rings hold at one moment, in as many batches as that takes: a ring that is refilled with
    ever older records can't keep others from being read.
    """
    count = merge(sources, records, origins, 0)
    if count < len(records):
        for index in range(len(sources)):
            look(sources[index], newest_ns, future_ns)
        count = merge(sources, records, origins, count)
    for index in range(len(sources)):
        source = sources[index]
        if source.consume:
            store_release_i64(source.base + READ_CURSOR, source.cursor)
    return count


@compiled
def merge(sources: Any, records: Any, origins: Any, count: int) -> int:
    """Go on with a pass: add to a batch of `count` records until it is full or nothing is left; return its number."""
    for index in range(len(sources)):
        peek(sources[index])
    room = len(records)
    target = records.ctypes.data
    while count < room:
        first, second_ns = choose(sources)
        source = sources[first]
        if source.head_ns == NEVER_NS:
            break
        # At least one, as it is the oldest; then while it stays so. Of equals the first ring's comes first.
        while True:
            if take(source, target + count * RECORD_BYTES):
                origins[count] = first
                count += 1
            peek(source)
            if source.head_ns >= second_ns or count == room:
                break
    return count


@compiled
def choose(sources: Any) -> Any:
    """The index of the ring with the oldest next record, and the timestamp up to which it stays the oldest."""
    first = 0
    second_ns = NEVER_NS
    for index in range(1, len(sources)):
        head_ns = sources[index].head_ns
        if head_ns < sources[first].head_ns:
            second_ns = sources[first].head_ns
            first = index
        elif head_ns < second_ns:
            second_ns = head_ns
    return first, second_ns
