"""The rate guard: whether a batch is within its rule's limits, by the bucket that all workers share.

    ──┬─────────┬────────▶ time     a batch moves `due` on by what it costs at the limit, from `now` if that is later
     now       due                  over the limit: due > now + BURST_NS; nothing is debited

A bucket is one word, the time at which it would be full again (the generic cell rate algorithm, ITU-T I.371), so one
compare-and-swap debits it. In any span of time a rule passes what its limit allows in that span and BURST_NS more, and
one batch: it is debited whole as soon as the bucket is not in debt beyond the burst. Time is the worker's, not that at
which the kernel received: a worker that lags behind the others would find their debits in its future, and drop what no
limit forbids. Workers write the buckets (guard_cells.py) and believe whatever is in them; limits are in the rule table,
which they can't write.
"""

from typing import Any

from logging_shm.atomics import add_atomic_i64, compare_exchange_i64, int64, load_acquire_i64
from logging_shm.jit import compiled
from relay.dataplane import layout
from relay.dataplane.layout import GUARD_CELL, offset_of
from relay.dataplane.records import record_at

BURST_NS = 100_000_000
# Costs are rounded up to a 16th of a nanosecond: 0.1 % of 30 M datagrams/s that come singly. 64 bits last 18 years.
TICKS_PER_NS_LOG2 = 4
TICKS_PER_S = 1_000_000_000 << TICKS_PER_NS_LOG2
BURST_TICKS = BURST_NS << TICKS_PER_NS_LOG2
TRIES_MAX = 16  # each that fails is another worker's batch debited
CELL_BYTES = GUARD_CELL.itemsize
PACKETS_OFFSET = offset_of(GUARD_CELL, "packets_due")
BITS_OFFSET = offset_of(GUARD_CELL, "bits_due")

guard_at = record_at(layout.GUARD)


@compiled
def cost(amount: int, limit: int) -> int:
    """How long `amount` takes at `limit` a second, in ticks. 64 datagrams or 65 507 bytes do not overflow."""
    return (int64(amount) * TICKS_PER_S + limit - 1) // limit


@compiled
def debit(due_at: int, now: int, ticks: int) -> bool:
    """Debit the bucket at an address unless it is in debt beyond the burst; whether it was debited.

    After TRIES_MAX it is debited all the same: workers that meet there pass a batch each, but lose none.
    """
    due = load_acquire_i64(due_at)
    for _ in range(TRIES_MAX):
        if due > now + BURST_TICKS:
            return False
        found = compare_exchange_i64(due_at, due, max(due, now) + ticks)
        if found == due:
            return True
        due = found
    if due > now + BURST_TICKS:
        return False
    add_atomic_i64(due_at, ticks)
    return True


@compiled
def admits(m: Any, t: Any, route: Any, batch: Any) -> bool:
    """Whether a batch may leave by a guarded ROUTE, debited to its rule's buckets then.

    `m.now_ns` may be as old as the pass: never too much is passed by that.
    """
    guard = guard_at(t.guards, int64(route.guard) - 1)
    cell = m.guard_cells + int64(route.rule) * CELL_BYTES
    now = m.now_ns << TICKS_PER_NS_LOG2
    packets_ticks = int64(0)
    if guard.max_pps:
        packets_ticks = cost(batch.datagrams, guard.max_pps)
        if not debit(cell + PACKETS_OFFSET, now, packets_ticks):
            return False
    if guard.max_bps and not debit(cell + BITS_OFFSET, now, cost(int64(batch.bytes) * 8, guard.max_bps)):
        if packets_ticks:
            add_atomic_i64(cell + PACKETS_OFFSET, -packets_ticks)
        return False
    return True
