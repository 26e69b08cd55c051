"""Quantiles of how long datagrams were in the relay, from a worker's histogram (relay/dataplane/latency.py).

A quantile is told as the upper end of its bucket, but no more than the greatest latency there was: never too little,
and too much by less than 1/16. Histograms of several workers may be added up before.
"""

from collections.abc import Sequence
from typing import Any

from relay.dataplane.layout import (
    COUNT_MAX,
    LATENCY_BUCKETS,
    LATENCY_NS_MIN_LOG2,
    LATENCY_SUB_BUCKETS_LOG2,
)
from relay.messages import LATENCY_BOUNDS_NS, Latency

SUB_BUCKETS = 1 << LATENCY_SUB_BUCKETS_LOG2
ERROR_MAX = 1 / SUB_BUCKETS  # of a quantile from 1.024 us to 17.2 s, relative
WHOLE = 10_000
QUANTILES = {"p50_us": 5000, "p90_us": 9000, "p99_us": 9900, "p99_9_us": 9990, "p99_99_us": 9999}  # of WHOLE


def upper_ns(bucket: int) -> int:
    """The least latency above a bucket. The last bucket has none: as if it were one of its power of two."""
    power, sub_bucket = divmod(bucket, SUB_BUCKETS)
    power += LATENCY_NS_MIN_LOG2
    return (1 << power) + (sub_bucket << (power - LATENCY_SUB_BUCKETS_LOG2))


def quantile_ns(counts: Sequence[int], part: int, max_ns: int) -> int:
    """The latency that `part` of WHOLE datagrams did not exceed; 0 of none."""
    wanted = max(1, -(-sum(counts) * part // WHOLE))
    below = 0
    for bucket, count in enumerate(counts):
        below += count
        if below >= wanted:
            return max_ns if bucket == LATENCY_BUCKETS - 1 else min(upper_ns(bucket), max_ns)
    return 0


def middle_ns(bucket: int) -> int:
    """Of a bucket, that is off by no more than 1/32 of a latency in it, from 1.024 us on."""
    return (upper_ns(bucket - 1) + upper_ns(bucket)) // 2 if bucket else upper_ns(0) // 2


def at_most(counts: Sequence[int], bound_ns: int) -> int:
    """How many were below a power of two; exact, as buckets end there."""
    return sum(counts[: 1 + ((bound_ns.bit_length() - 1 - LATENCY_NS_MIN_LOG2) << LATENCY_SUB_BUCKETS_LOG2)])


def latency_of(counts: Any, max_ns: int) -> Latency | None:
    """The quantiles of a worker's counts by bucket; None of none. What it wrote may be anything."""
    numbers = [max(int(count), 0) for count in counts]
    if not any(numbers):
        return None
    max_ns = min(max(max_ns, 0), 1 << 62)
    quantiles = {name: quantile_ns(numbers, part, max_ns) / 1000 for name, part in QUANTILES.items()}
    return Latency(
        datagrams=min(sum(numbers), COUNT_MAX),
        **quantiles,
        max_us=max_ns / 1000,
        sum_us=sum(count * middle_ns(bucket) for bucket, count in enumerate(numbers)) / 1000,
        at_most=[min(at_most(numbers, bound_ns), COUNT_MAX) for bound_ns in LATENCY_BOUNDS_NS],
    )
