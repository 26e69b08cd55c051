"""Two processes, one ring, as fast as they can: nothing torn, nothing lost unless counted, order kept.

Every record carries a checksum over all that it holds. MCR_STRESS_RECORDS (default 5 000 000; the long run has
100 000 000) and MCR_STRESS_KILLS (default 1 000) set how much.
"""

import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from logging_shm import Reader, Severity, SharedSPSCRingBuffer
from logging_shm.atomics import int64, load_i64, load_u8, load_u16, store_i64
from logging_shm.compiled import write_event, write_event_about, write_text
from logging_shm.jit import compiled
from logging_shm.layout import MESSAGE_BYTES_MAX, PAIR, RECORD, RECORD_BYTES, pair_key
from tests.logging_shm.conftest import MakeRing

RECORDS = int(os.environ.get("MCR_STRESS_RECORDS", "5000000"))
KILLS = int(os.environ.get("MCR_STRESS_KILLS", "1000"))
CAPACITY = 4096
INFO = int(Severity.Info)
EVENT, EVENT_ABOUT = 1, 2
KEY = pair_key("about")
DEADLINE_S = 240.0
MESSAGE, LENGTH, FORMAT = RECORD["message"], RECORD["message_length"], RECORD["format"]
VALUE = RECORD["pairs"] + PAIR["value"]
SEQUENCE, TIMESTAMP, PROCESS = RECORD["sequence"], RECORD["timestamp_ns"], RECORD["process"]
TORN = -1


@compiled
def mix(value: int) -> int:
    """A checksum step: what differs in one bit differs in many."""
    value = int64(value) * int64(0x5851F42D4C957F2D) + int64(0x14057B7EF767814F)
    return int64(value ^ (value >> 29))


@compiled
def write_numbered(segment: Any, number: int, text: Any) -> bool:
    """Write record `number`, in turn as typed arguments, as those with a pair, and as text of up to 160 bytes."""
    check = mix(number)
    kind = number % 3
    if kind == 0:
        written = (number, check, mix(check), number, check, number, check, mix(number + 1))
        return write_event(segment, INFO, EVENT, number + 1, written)
    base = text.ctypes.data
    if kind == 1:
        store_i64(base, check)
        store_i64(base + 8, number)
        return write_event_about(segment, INFO, EVENT_ABOUT, number + 1, (number, check), KEY, text, 16)
    words = 2 + number % 19
    for word in range(words):
        store_i64(base + 8 * word, number if word == 0 else mix(check + word))
    return write_text(segment, INFO, number + 1, text, 8 * words)


@compiled
def number_of(record: int) -> int:
    """The number of a record whose every part agrees with it, TORN otherwise."""
    number = int64(load_i64(record + MESSAGE))
    check = mix(number)
    length = int64(load_u8(record + LENGTH))
    kind = int64(load_u16(record + FORMAT))
    if load_i64(record + TIMESTAMP) != number + 1:
        return TORN
    if kind == EVENT:
        expected = (number, check, mix(check), number, check, number, check, mix(number + 1))
        for word in range(8):
            if load_i64(record + MESSAGE + 8 * word) != expected[word]:
                return TORN
        return number if length == 64 and number % 3 == 0 else TORN
    if kind == EVENT_ABOUT:
        whole = load_i64(record + VALUE) == check and load_i64(record + VALUE + 8) == number
        return number if whole and load_i64(record + MESSAGE + 8) == check and length == 16 else TORN
    for word in range(1, length // 8):
        if load_i64(record + MESSAGE + 8 * word) != mix(check + word):
            return TORN
    return number if number % 3 == 2 and length == 8 * (2 + number % 19) else TORN


@compiled
def produce(segment: Any, first: int, count: int, text: Any) -> int:
    """Write `count` records; a full ring refuses some. Returns how many it refused."""
    refused = 0
    for number in range(first, first + count):
        if not write_numbered(segment, number, text):
            refused += 1
    return refused


@compiled
def check_batch(records: Any, last: int) -> Any:
    """Check a batch; return the number of its last record, how many were torn, and how many out of order."""
    torn = disordered = 0
    for index in range(len(records)):
        number = number_of(records.ctypes.data + index * RECORD_BYTES)
        if number == TORN:
            torn += 1
            continue
        if number <= last:
            disordered += 1
        last = number
    return last, torn, disordered


def text_buffer() -> Any:
    return np.zeros(MESSAGE_BYTES_MAX // 8, np.int64).view(np.uint8)


def compile_all(ring: SharedSPSCRingBuffer) -> None:
    """Before the fork, so that the child needs no compiler."""
    produce(ring.segment.bytes, 0, 0, text_buffer())
    check_batch(np.zeros((0, RECORD_BYTES), np.uint8), TORN)


def in_a_child(work: Callable[[], object]) -> int:
    """Fork a process that does this and ends; its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def has_ended(pid: int) -> bool:
    return os.waitpid(pid, os.WNOHANG) != (0, 0)


def without_reports(records: Any) -> Any:
    """Records of writers; what the reader itself reports is of no process."""
    return np.ascontiguousarray(records[records[:, PROCESS : PROCESS + 4].any(axis=1)])


# The overwriting ring is so small that the writer comes round while the reader copies.
@pytest.mark.parametrize(
    ("overwrite", "capacity"),
    [(False, CAPACITY), (True, 4), (True, CAPACITY)],
    ids=["full-drops", "full-overwrites", "large-overwrites"],
)
def test_a_writer_and_a_reader_lose_nothing_uncounted_and_tear_nothing(
    make_ring: MakeRing, overwrite: bool, capacity: int
) -> None:
    ring = make_ring(capacity, overwrite=overwrite)
    compile_all(ring)
    reader = Reader(delay_ns=0)
    reader.add([ring])
    pid = in_a_child(partial(produce, ring.segment.bytes, 0, RECORDS, text_buffer()))
    last, torn, disordered, read, ended = TORN, 0, 0, 0, False
    deadline_s = time.monotonic() + DEADLINE_S + RECORDS / 50_000
    while not (ended and reader.lag() == 0):
        ended = ended or has_ended(pid)
        batch = reader.read(everything=True)
        records = without_reports(batch.records)
        last, batch_torn, batch_disordered = check_batch(records, last)
        torn, disordered, read = torn + batch_torn, disordered + batch_disordered, read + len(records)
        assert time.monotonic() < deadline_s
    counted = int(reader._sources["missed"][0]) if overwrite else sum(ring.segment.dropped())
    assert (torn, disordered) == (0, 0)
    assert read + counted == RECORDS
    assert int(reader._sources["damaged"][0]) == 0


def kill_after(ring: SharedSPSCRingBuffer, pid: int, written: int, spins: int) -> None:
    """Kill a writer some instructions after it has written its first records."""
    deadline_s = time.monotonic() + DEADLINE_S
    while ring.segment.get("write_cursor") == written:
        assert time.monotonic() < deadline_s
    for _ in range(spins):
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_writers_killed_at_random_points_cost_at_most_the_record_they_were_in(make_ring: MakeRing) -> None:
    ring = make_ring(CAPACITY, overwrite=True)
    compile_all(ring)
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    reader = Reader(delay_ns=0)
    reader.add([ring])
    for turn in range(KILLS):
        written = ring.segment.get("write_cursor")

        def write_for_ever(first: int = turn << 32) -> None:
            ring.segment.claim()
            produce(ring.segment.bytes, first, 1 << 31, text_buffer())

        pid = in_a_child(write_for_ever)
        kill_after(ring, pid, written, chance.randrange(2000))
        unfinished = ring.segment.get("unfinished")
        ring.segment.finish_dead()
        assert ring.segment.get("unfinished") - unfinished in (0, 1)
        records = without_reports(reader.read(everything=True).records)
        last, torn, disordered = check_batch(records, (turn << 32) - 1)
        assert (torn, disordered) == (0, 0)
        sequences = records[:, SEQUENCE : SEQUENCE + 8].copy().view(np.int64)[:, 0]
        assert (np.diff(sequences) == 1).all(), "a hole in the ring"
        assert int(sequences[-1]) == ring.segment.get("write_cursor") - 1
        assert last >> 32 == turn
    assert int(reader._sources["damaged"][0]) == 0
