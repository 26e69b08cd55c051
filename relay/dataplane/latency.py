"""Latency: from the kernel's receive time of a frame until its datagrams are sent, as a histogram of the worker.

Receive time is the ring frame's, the time of sending that of the end of the drain that sends it: the kernel has taken
every datagram of it then, so what is counted is never less than what was. One clock read a drain. Both times are of
CLOCK_REALTIME, as the ring has no other: a step of that clock is in the latencies of the frames that it meets.

Buckets are log-linear, as HdrHistogram's: a power of two has 2^LATENCY_SUB_BUCKETS_LOG2 of equal width.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from logging_shm.atomics import int64
from logging_shm.jit import compiled
from relay.dataplane.layout import (
    HEALTH,
    LATENCY_BUCKETS,
    LATENCY_NS_MAX_LOG2,
    LATENCY_NS_MIN_LOG2,
    LATENCY_SUB_BUCKETS_LOG2,
    offset_of,
)
from relay.dataplane.memory import health_at, i64_at, pending_at, timespec_of
from relay.dataplane.syscalls import clock_gettime

CLOCK_REALTIME = 0
LATENCY_OFFSET = offset_of(HEALTH, "latency")
NS_MIN = 1 << LATENCY_NS_MIN_LOG2
NS_MAX = 1 << LATENCY_NS_MAX_LOG2
SUB_BUCKETS = 1 << LATENCY_SUB_BUCKETS_LOG2


def _log2_of(typing_context: Any, value: Any) -> Any:
    """The place of the highest set bit of a positive number."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = context.cast(builder, args[0], signature.args[0], types.int64)
        return builder.sub(ir.IntType(64)(63), builder.ctlz(wide, ir.IntType(1)(1)))

    return types.int64(value), generate


log2_of: Any = intrinsic(_log2_of)


@compiled
def bucket_of(latency_ns: int) -> int:
    """The bucket of a latency: the first below NS_MIN, the last from NS_MAX on."""
    if latency_ns < NS_MIN:
        return 0
    if latency_ns >= NS_MAX:
        return LATENCY_BUCKETS - 1
    power = log2_of(latency_ns)
    sub_bucket = (latency_ns >> (power - LATENCY_SUB_BUCKETS_LOG2)) & (SUB_BUCKETS - 1)
    return 1 + ((power - LATENCY_NS_MIN_LOG2) << LATENCY_SUB_BUCKETS_LOG2) + sub_bucket


@compiled
def lower_ns(bucket: int) -> int:
    """The least latency of a bucket; of the one behind the last, where there is an end to everything."""
    if bucket <= 0:
        return 0
    if bucket >= LATENCY_BUCKETS:
        return 1 << 62
    power = LATENCY_NS_MIN_LOG2 + ((bucket - 1) >> LATENCY_SUB_BUCKETS_LOG2)
    sub_bucket = (bucket - 1) & (SUB_BUCKETS - 1)
    return (1 << power) + (sub_bucket << (power - LATENCY_SUB_BUCKETS_LOG2))


@compiled
def begin_latency(m: Any, datagram: Any) -> None:
    """Note when a matched DATAGRAM was received, until the drain that sends it."""
    pending = pending_at(m.pending, m.pending_count)
    pending.received_ns = datagram.received_ns
    pending.datagrams = datagram.datagrams
    m.pending_count += 1


@compiled
def count_latencies(m: Any, sent_ns: int) -> None:
    """Count what is pending as sent at `sent_ns`. Neighbours mostly fall into one bucket, which is added to once."""
    first_ns, end_ns = int64(0), int64(0)  # received then: the same bucket as the datagram before
    bucket, datagrams = int64(0), int64(0)
    oldest_ns = sent_ns
    for i in range(m.pending_count):
        pending = pending_at(m.pending, i)
        received_ns = int64(pending.received_ns)
        if not first_ns <= received_ns < end_ns:
            i64_at(m.health + LATENCY_OFFSET, bucket).value += datagrams
            datagrams = int64(0)
            latency_ns = max(sent_ns - received_ns, 0)  # the clock may have been set back
            bucket = bucket_of(latency_ns)
            end_ns = sent_ns - lower_ns(bucket) + 1
            first_ns = sent_ns - lower_ns(bucket + 1) + 1
            oldest_ns = min(oldest_ns, received_ns)
        elif received_ns < oldest_ns:
            oldest_ns = received_ns
        datagrams += pending.datagrams
    i64_at(m.health + LATENCY_OFFSET, bucket).value += datagrams
    health = health_at(m.health, 0)
    health.latency_ns_max = max(health.latency_ns_max, sent_ns - oldest_ns)
    m.pending_count = 0


@compiled
def end_latencies(m: Any) -> None:
    """What is pending has been sent."""
    if m.pending_count:
        clock_gettime(CLOCK_REALTIME, timespec_of(m))
        count_latencies(m, m.timespec[0] * 1_000_000_000 + m.timespec[1])
