"""The rate guard, as compiled: what passes is under the limit in any span, whatever comes and whoever counts."""

import mmap
import multiprocessing
import os
from collections.abc import Sequence
from multiprocessing.synchronize import Barrier
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logging_shm.atomics import add_atomic_i64, compare_exchange_i64
from logging_shm.jit import compiled
from relay.dataplane import layout
from relay.dataplane.coalesce import close_batch
from relay.dataplane.guard import BURST_NS, BURST_TICKS, TICKS_PER_NS_LOG2, TICKS_PER_S, cost, debit
from relay.dataplane.guard_cells import GUARD_CELLS_BYTES, GuardCells, map_guard_cells
from relay.dataplane.layout import UDP_SEGMENTS_MAX, DropCause
from relay.dataplane.memory import address_of
from relay.dataplane.syscalls import load_liburing
from relay.dataplane.table import TableRule, compile_table, view_table
from tests.relay.dataplane.bare import bare_memory

WORKERS = 4
ALLOWED = int(os.environ.get("MCR_GUARD_DEBITS", "4000000"))  # batches in a burst, of processes that share a bucket
NOW = 10**15 << TICKS_PER_NS_LOG2
TICKS = BURST_TICKS // ALLOWED
# (nanoseconds since the former batch, datagrams, bytes of each)
BATCHES = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 1000), st.integers(0, 10_000_000), st.integers(0, 10**10)),
        st.integers(1, UDP_SEGMENTS_MAX),
        st.integers(0, 1000),
    ),
    max_size=60,
)
PPS = st.integers(1, 10**8)
BPS = st.integers(1000, 10**12)


@compiled
def swapped(address: int, expected: int, wanted: int) -> Any:
    """compare_exchange_i64 from Python."""
    return compare_exchange_i64(address, expected, wanted)


@compiled
def added(address: int, increment: int) -> Any:
    """add_atomic_i64 from Python."""
    return add_atomic_i64(address, increment)


def test_compare_exchange_stores_only_where_it_finds_what_is_expected() -> None:
    words = np.array([5, 7], np.int64)
    assert (swapped(address_of(words), 4, 9), words.tolist()) == (5, [5, 7])
    assert (swapped(address_of(words), 5, -9), words.tolist()) == (5, [-9, 7])
    assert (added(address_of(words) + 8, -10), words.tolist()) == (7, [-9, -3])


class Guarded:
    """Rules that share an input, closing batches into no output, on buckets of their own."""

    def __init__(self, *limits: tuple[int, int], cells: Any = None) -> None:
        rules = [
            TableRule(slot, f"r{slot}", 100, 1, 0, (0,), False, (), max_pps, max_bps)
            for slot, (max_pps, max_bps) in enumerate(limits)
        ]
        load_liburing()  # what closes a batch is linked with what sends it
        self.memory = bare_memory()
        self.cells = np.zeros(layout.RULES_MAX, layout.GUARD_CELL) if cells is None else cells
        self.memory.use_guard_cells(self.cells)
        self.table = view_table(compile_table(rules, (), 1))

    def close(self, now_ns: int, datagrams: int, payload_bytes: int) -> None:
        """A batch of so many datagrams."""
        batch = self.memory["batches"][0]
        batch["entry"], batch["datagrams"], batch["bytes"] = 0, datagrams, payload_bytes
        self.memory.worker["now_ns"] = now_ns
        close_batch(self.memory.worker, self.table.view, 0)

    @property
    def dropped(self) -> list[int]:
        """By rule, of the first two."""
        return [int(number) for number in self.memory["rule_stats"]["drops_rate_limit"][:2]]


def assert_bounded(passed: Sequence[tuple[int, int, int]], max_pps: int, max_bps: int) -> None:
    """In every span between two batches that passed, both included: no more than the limit, the burst and a batch."""
    for limit, amounts in (
        (max_pps, [count for _, count, _ in passed]),
        (max_bps, [8 * size for _, _, size in passed]),
    ):
        for first in range(len(passed)) if limit else ():
            total = 0
            for last in range(first, len(passed)):
                total += amounts[last]
                span_ns = passed[last][0] - passed[first][0]
                assert (total - amounts[last]) * 10**9 <= limit * (span_ns + BURST_NS)


@settings(max_examples=150)
@given(batches=BATCHES, max_pps=st.one_of(st.just(0), PPS), max_bps=st.one_of(st.just(0), BPS))
def test_no_span_passes_more_than_limit_and_burst_and_a_batch(
    batches: list[tuple[int, int, int]], max_pps: int, max_bps: int
) -> None:
    guarded = Guarded((max_pps, max_bps), (0, 0))
    now_ns, passed = 10**15, list[tuple[int, int, int]]()
    dropped = total = 0
    for gap_ns, datagrams, size in batches:
        now_ns += gap_ns
        total += datagrams
        guarded.close(now_ns, datagrams, datagrams * size)
        if guarded.dropped[0] == dropped:
            passed.append((now_ns, datagrams, datagrams * size))
        dropped = guarded.dropped[0]
    assert_bounded(passed, max_pps, max_bps)
    assert guarded.dropped == [total - sum(count for _, count, _ in passed), 0]
    assert guarded.memory["stats"][0]["drops"].tolist()[DropCause.RATE_LIMIT] == dropped
    assert guarded.memory["rule_stats"]["packets"][:2].tolist() == [total, total]
    if not max_pps and not max_bps:
        assert dropped == 0


@settings(max_examples=100)
@given(batches=BATCHES, max_pps=PPS, max_bps=BPS)
def test_what_stays_under_both_limits_passes_whole(
    batches: list[tuple[int, int, int]], max_pps: int, max_bps: int
) -> None:
    """Each batch comes no sooner than its predecessor takes at the slower of the two limits."""
    guarded = Guarded((max_pps, max_bps))
    now_ns = 10**15
    for gap_ns, datagrams, size in batches:
        guarded.close(now_ns, datagrams, datagrams * size)
        ticks = max(cost(datagrams, max_pps), cost(8 * datagrams * size, max_bps))
        now_ns += gap_ns + -(-ticks // (1 << TICKS_PER_NS_LOG2))
    assert guarded.dropped[0] == 0


def test_the_long_run_rate_is_the_limit() -> None:
    """A million datagrams a second for ten seconds, of which 1 000 a second may pass."""
    guarded = Guarded((1000, 0))
    batches = 10 * 10**6 // UDP_SEGMENTS_MAX
    for number in range(batches):
        guarded.close(10**15 + number * UDP_SEGMENTS_MAX * 1000, UDP_SEGMENTS_MAX, 0)
    passed = batches * UDP_SEGMENTS_MAX - guarded.dropped[0]
    assert 10_000 + 100 - UDP_SEGMENTS_MAX <= passed <= 10_000 + 100 + UDP_SEGMENTS_MAX


def test_a_batch_over_one_limit_is_not_debited_to_the_other() -> None:
    guarded = Guarded((1000, 1000))
    for _ in range(3):
        guarded.close(10**15, 1, 100)
    assert guarded.dropped[0] == 2
    packets_due = int(guarded.cells["packets_due"][0]) - (10**15 << TICKS_PER_NS_LOG2)
    assert packets_due == TICKS_PER_S // 1000


def test_a_rule_over_its_limit_takes_nothing_from_its_neighbour() -> None:
    guarded = Guarded((10, 0), (0, 0))
    for number in range(100):
        guarded.close(10**15 + number, 10, 10)
    assert guarded.dropped[0] == 990
    assert guarded.dropped[1] == 0


@given(due=st.integers(-(1 << 63), (1 << 63) - 1))
def test_whatever_is_in_a_bucket_is_a_time(due: int) -> None:
    """A worker that was taken over may write anything there."""
    words = np.array([due], np.int64)
    assert debit(address_of(words), NOW, TICKS_PER_S) == (due <= NOW + BURST_TICKS)
    assert int(words[0]) == (due if due > NOW + BURST_TICKS else max(due, NOW) + TICKS_PER_S)


def test_the_buckets_file_cannot_be_cut_and_can_be_filled() -> None:
    guard_cells = GuardCells()
    try:
        mapped = map_guard_cells(guard_cells.fileno())
        mapped["packets_due"][:3] = 7
        guard_cells.fill([0, 2])
        assert mapped["packets_due"][:3].tolist() == [0, 7, 0]
        assert layout.GUARD_CELL.itemsize == 64
        assert address_of(mapped) % mmap.PAGESIZE == 0
        for size in (0, 2 * GUARD_CELLS_BYTES):
            with pytest.raises(PermissionError):
                os.ftruncate(guard_cells.fileno(), size)
    finally:
        guard_cells.close()


@compiled
def rush(due_at: int, now: int, ticks: int, count: int) -> Any:
    """Debit as fast as it goes; how often that succeeded."""
    passed = 0
    for _ in range(count):
        if debit(due_at, now, ticks):
            passed += 1
    return passed


def hurry(descriptor: int, barrier: Barrier, results: Any, number: int) -> None:
    """A worker that closes batches without a pause, until the bucket allows no more."""
    cells = map_guard_cells(descriptor)
    due_at = address_of(cells)
    rush(due_at, NOW, TICKS, 0)
    barrier.wait()
    passed = 0
    while more := rush(due_at, NOW, TICKS, 1000):
        passed += more
    results[number] = passed


def test_processes_that_share_a_bucket_pass_together_what_it_allows() -> None:
    """Time stands still, so that every debit counts: none may be lost where processes meet."""
    guard_cells = GuardCells()
    context = multiprocessing.get_context("fork")
    try:
        results: Any = context.Array("q", WORKERS)
        barrier = context.Barrier(WORKERS)
        processes = [
            context.Process(target=hurry, args=(guard_cells.fileno(), barrier, results, number))
            for number in range(WORKERS)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * WORKERS
        passed = sum(list(results))
        assert int(guard_cells.cells["packets_due"][0]) == NOW + passed * TICKS
        assert ALLOWED < passed <= ALLOWED + WORKERS
    finally:
        guard_cells.close()
