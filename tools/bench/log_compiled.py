"""What a log record costs from compiled code: typed, text, filtered out, refused by a full ring.

Percentiles are of single records, less what the clock costs by itself (its steps are of 10 ns on some machines); "in a
row" is the mean of a block. The ring is emptied between blocks, outside of what is timed.
"""

import os
import statistics
from typing import Any

import numpy as np
from numba import njit
from rich.console import Console
from rich.table import Table

from logging_shm import Severity, SharedSPSCRingBuffer
from logging_shm.atomics import int64, load_i64, store_i64
from logging_shm.compiled import clock_gettime, write_event, write_text
from logging_shm.layout import HEADER

CAPACITY = 4096
BLOCK = 2048  # records between two emptyings
RECORDS = 200_000
BLOCKS = 50
EVENT = 1
TEXT = "First packet of rule tv from 10.0.0.7:5001"
FORMATS = {EVENT: "Received {0:d} datagrams, {1:d} bytes from {2:ip}:{3:port}"}
DEBUG, INFO = int(Severity.Debug), int(Severity.Info)
WRITE_CURSOR, READ_CURSOR = HEADER["write_cursor"], HEADER["read_cursor"]
READ_CURSOR_SEEN = HEADER["read_cursor_seen"]


@njit(cache=True, nogil=True)
def now_ns(scratch: Any) -> int:
    """CLOCK_MONOTONIC."""
    address = scratch.ctypes.data
    clock_gettime(1, address)
    return int64(load_i64(address)) * 1_000_000_000 + int64(load_i64(address + 8))


@njit(cache=True, nogil=True)
def write_own_clock(segment: Any, number: int, text: Any) -> None:
    """Four typed arguments, and the time now."""
    write_event(segment, INFO, EVENT, 0, (number, 1316, 0x0A000007, 5001))


@njit(cache=True, nogil=True)
def write_given_clock(segment: Any, number: int, text: Any) -> None:
    """Four typed arguments, and a time that is known already."""
    write_event(segment, INFO, EVENT, number + 1, (number, 1316, 0x0A000007, 5001))


@njit(cache=True, nogil=True)
def write_a_text(segment: Any, number: int, text: Any) -> None:
    """Text, and the time now."""
    write_text(segment, INFO, 0, text, len(text))


@njit(cache=True, nogil=True)
def write_filtered(segment: Any, number: int, text: Any) -> None:
    """A record whose level is off."""
    write_event(segment, DEBUG, EVENT, 0, (number, 1316, 0x0A000007, 5001))


@njit(cache=True, nogil=True)
def write_nothing(segment: Any, number: int, text: Any) -> None:
    """What the loop around the others costs."""


@njit(nogil=True)
def time_records(write: Any, segment: Any, empty: bool, text: Any, took: Any, scratch: Any) -> None:
    """Write len(took) records, each timed by itself; with `empty`, the ring is emptied after each BLOCK."""
    base = segment.ctypes.data
    for number in range(len(took)):
        if number % BLOCK == 0 and empty:
            store_i64(base + READ_CURSOR, load_i64(base + WRITE_CURSOR))
            store_i64(base + READ_CURSOR_SEEN, load_i64(base + WRITE_CURSOR))
        begin = now_ns(scratch)
        write(segment, number, text)
        took[number] = now_ns(scratch) - begin


@njit(nogil=True)
def time_block(write: Any, segment: Any, empty: bool, text: Any, scratch: Any) -> float:
    """The mean of BLOCK records in a row: without the clock, and with the records overlapping in the processor."""
    base = segment.ctypes.data
    if empty:
        store_i64(base + READ_CURSOR, load_i64(base + WRITE_CURSOR))
        store_i64(base + READ_CURSOR_SEEN, load_i64(base + WRITE_CURSOR))
    begin = now_ns(scratch)
    for number in range(BLOCK):
        write(segment, number, text)
    return (now_ns(scratch) - begin) / BLOCK


KINDS = {
    "typed, own timestamp": write_own_clock,
    "typed, the packet's timestamp": write_given_clock,
    "text of 43 bytes, own timestamp": write_a_text,
    "filtered out": write_filtered,
    "ring full": write_given_clock,
}
FULL = "ring full"


def fill(ring: SharedSPSCRingBuffer) -> None:
    """Write until the ring is full."""
    while ring.append(INFO, TEXT):
        pass


def bench_compiled(rounds: int, console: Console) -> Table:
    """Time each kind of record from compiled code."""
    text = np.frombuffer(TEXT.encode(), np.uint8)
    scratch = np.zeros(2, np.int64)
    took = np.zeros(RECORDS, np.int64)
    results: dict[str, list[tuple[float, ...]]] = {name: [] for name in KINDS}
    with SharedSPSCRingBuffer.create(f"mcr_bench{os.getpid()}", CAPACITY, formats=FORMATS) as ring:
        ring.segment.level = Severity.Info
        segment = ring.segment.bytes
        for round_number in range(rounds + 1):
            time_records(write_nothing, segment, False, text, took, scratch)
            clock_ns = float(np.median(took))
            for name, write in KINDS.items():
                if name == FULL:
                    fill(ring)
                time_records(write, segment, name != FULL, text, took, scratch)
                single = np.percentile(took, [50, 99, 99.9]) - clock_ns
                blocks = [time_block(write, segment, name != FULL, text, scratch) for _ in range(BLOCKS)]
                if round_number:  # the first warms up
                    results[name].append((statistics.median(blocks), *single.tolist()))
    table = Table(
        title=f"compiled: ns a record, medians of {rounds} rounds of {RECORDS:,}; the clock costs {clock_ns:.0f} ns"
    )
    for column in ("record", "in a row", "p50", "p99", "p99.9"):
        table.add_column(column, justify="left" if column == "record" else "right")
    for name, rows in results.items():
        table.add_row(name, *(f"{statistics.median(values):.1f}" for values in zip(*rows, strict=True)))
    return table
