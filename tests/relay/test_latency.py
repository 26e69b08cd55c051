"""Quantiles of the histogram that the compiled loop fills, against those of the samples themselves."""

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from relay.dataplane import latency as compiled_latency
from relay.dataplane import layout
from relay.latency import ERROR_MAX, QUANTILES, WHOLE, latency_of
from relay.messages import LATENCY_BOUNDS_NS
from tests.relay.dataplane.bare import bare_memory

SENT_NS = 1_800_000_000_000_000_000
NS_MIN = 1 << layout.LATENCY_NS_MIN_LOG2
NS_MAX = 1 << layout.LATENCY_NS_MAX_LOG2
MEMORY = bare_memory()
HEALTH = MEMORY["health"][0]
SAMPLES = st.lists(
    st.tuples(st.one_of(st.integers(0, 30_000), st.integers(0, NS_MAX - 1)), st.integers(1, 64)),
    min_size=1,
    max_size=300,
)


def record(samples: list[tuple[int, int]], passes: int = 1) -> None:
    """Have (latency, datagrams) counted, in some passes."""
    HEALTH["latency"] = 0
    HEALTH["latency_ns_max"] = 0
    for first in range(passes):
        mine = samples[first::passes]
        MEMORY["pending"][: len(mine)] = [(SENT_NS - latency_ns, datagrams) for latency_ns, datagrams in mine]
        MEMORY.worker["pending_count"] = len(mine)
        compiled_latency.count_latencies(MEMORY.worker, SENT_NS)


@settings(max_examples=200, deadline=None)
@given(samples=SAMPLES, passes=st.integers(1, 3))
@example(samples=[(0, 1)], passes=1)
@example(samples=[(NS_MAX - 1, 64)], passes=1)
def test_quantiles_are_those_of_the_samples_within_a_buckets_width(samples: list[tuple[int, int]], passes: int) -> None:
    record(samples, passes)
    told = latency_of(HEALTH["latency"], int(HEALTH["latency_ns_max"]))
    raw = np.repeat([latency_ns for latency_ns, _ in samples], [datagrams for _, datagrams in samples])
    assert told is not None
    assert told.datagrams == len(raw)
    assert told.max_us == raw.max() / 1000
    for name, part in QUANTILES.items():
        exact_us = np.quantile(raw, part / WHOLE, method="inverted_cdf") / 1000
        assert exact_us <= getattr(told, name) <= max(exact_us * (1 + ERROR_MAX), NS_MIN / 1000) + 0.001


@settings(max_examples=100, deadline=None)
@given(samples=SAMPLES)
@example(samples=[(bound_ns, 1) for bound_ns in LATENCY_BOUNDS_NS])
@example(samples=[(bound_ns - 1, 1) for bound_ns in LATENCY_BOUNDS_NS])
def test_coarse_buckets_are_exact_and_the_sum_nearly(samples: list[tuple[int, int]]) -> None:
    record(samples)
    told = latency_of(HEALTH["latency"], int(HEALTH["latency_ns_max"]))
    assert told is not None
    assert told.at_most == [sum(n for latency_ns, n in samples if latency_ns < bound) for bound in LATENCY_BOUNDS_NS]
    exact_us = sum(latency_ns * n for latency_ns, n in samples) / 1000
    assert abs(told.sum_us - exact_us) <= exact_us / 32 + told.datagrams * NS_MIN / 2000 + 0.001


@settings(max_examples=300)
@given(latency_ns=st.integers(0, 1 << 40))
def test_a_latency_is_within_its_bucket(latency_ns: int) -> None:
    bucket = compiled_latency.bucket_of(latency_ns)
    assert compiled_latency.lower_ns(bucket) <= latency_ns < compiled_latency.lower_ns(bucket + 1)


def test_a_clock_that_was_set_back_counts_as_no_latency_at_all() -> None:
    record([(-5_000_000_000, 3)])
    assert HEALTH["latency"][0] == 3
    assert HEALTH["latency_ns_max"] == 0


def test_numbers_that_no_worker_writes_do_no_harm() -> None:
    counts = np.full(layout.LATENCY_BUCKETS, -(1 << 62))
    assert latency_of(counts, -1) is None
    counts[:] = (1 << 63) - 1
    told = latency_of(counts, (1 << 63) - 1)
    assert told is not None
    assert told.datagrams == layout.COUNT_MAX
