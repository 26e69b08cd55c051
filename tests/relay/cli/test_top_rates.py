"""Rates of many rules from counters of shared memory: exact sums, no nonsense from counters that went back or wrong."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.cli.top.rates import (
    EXACT_MAX,
    HISTORY_S,
    Counts,
    History,
    Places,
    count,
    grown,
    match,
    rates,
    rearranged,
)
from relay.dataplane.layout import OUTPUT_STATS, OUTPUTS_MAX, RULE_STATS, RULES_MAX


def segment() -> tuple[Any, Any]:
    return np.zeros(RULES_MAX, RULE_STATS), np.zeros(OUTPUTS_MAX, OUTPUT_STATS)


slots = st.lists(
    st.tuples(
        st.integers(0, RULES_MAX - 1), st.lists(st.integers(0, OUTPUTS_MAX - 1), min_size=1, max_size=5, unique=True)
    ),
    max_size=8,
    unique_by=lambda slot: slot[0],
)


@given(slots, st.integers(1, 3), st.integers(0, 1 << 40))
def test_sums_are_those_of_a_loop(places: list[tuple[int, list[int]]], workers: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    segments = [segment() for _ in range(workers)]
    for rules, outputs in segments:
        for rule, its_outputs in places:
            rules[rule]["packets"], rules[rule]["bytes"], rules[rule]["last_ns"] = random.integers(0, 1 << 40, 3)
            for output in its_outputs:
                for name in ("packets", "bytes", "drops_ttl", "drops_full", "drops_error"):
                    outputs[output][name] = random.integers(0, 1 << 40)
    counts = count(segments, Places.of(places))
    for i, (rule, its_outputs) in enumerate(places):
        chosen = [outputs[its_outputs] for _, outputs in segments]
        assert counts.received[i] == sum(int(rules[rule]["packets"]) for rules, _ in segments)
        assert counts.received_bytes[i] == sum(int(rules[rule]["bytes"]) for rules, _ in segments)
        assert counts.sent[i] == sum(int(outputs["packets"].sum()) for outputs in chosen)
        assert counts.sent_bytes[i] == sum(int(outputs["bytes"].sum()) for outputs in chosen)
        names = ("drops_ttl", "drops_full", "drops_error")
        assert counts.drops[i] == sum(int(outputs[name].sum()) for outputs in chosen for name in names)
        assert counts.last_ns[i] == max(int(rules[rule]["last_ns"]) for rules, _ in segments)


def test_a_rate_is_what_was_counted_a_second() -> None:
    older = Counts(*(np.array([value]) for value in (100, 1000, 50, 500, 7, 1)))
    newer = Counts(*(np.array([value]) for value in (300, 3000, 450, 4500, 9, 2)))
    got = rates(newer, older, 2.0)
    assert [float(values[0]) for values in got] == [100.0, 200.0, 16_000.0, 1.0]
    assert all(not values.any() for values in rates(newer, older, 0.0))


def test_counters_that_went_back_began_again_at_zero() -> None:
    assert grown(np.array([5, 3]), np.array([2, 10])).tolist() == [3, 3]


def test_whatever_a_worker_wrote_gives_no_negative_counts() -> None:
    rules, outputs = segment()
    rules[1]["packets"], outputs[2]["packets"], outputs[3]["packets"] = -5, -(1 << 63), (1 << 63) - 1
    counts = count([(rules, outputs)], Places.of([(1, [2, 3])]))
    assert (counts.received[0], counts.sent[0]) == (0, EXACT_MAX)


def test_rules_keep_what_is_known_of_them_when_others_come_and_go() -> None:
    former = match(["c", "a", "new"], ["a", "b", "c"])
    assert rearranged(np.array([1, 2, 3]), former, np.array([7, 8, 9])).tolist() == [3, 1, 9]
    assert rearranged(np.zeros(0), match(["a"], []), np.array([4])).tolist() == [4]


@pytest.mark.parametrize("step_s", [0.25, 1.0, 5.0])
@pytest.mark.parametrize("width", [8, 15, 60])
def test_bars_show_the_rate_of_each_span_of_the_last_minute(step_s: float, width: int) -> None:
    history = History()
    history.rearrange(match(["steady", "stopped"], []))
    half_s = HISTORY_S / 2
    for i in range(int(120 / step_s) + 1):
        now_s = 1000 + i * step_s
        is_old = now_s <= 1120 - half_s
        history.add(now_s, np.array([100 * step_s, 100 * step_s if is_old else 0]))
    bars = history.snapshot().bars(np.array([0, 1]), 1120.0, width)
    assert bars.shape == (2, width)
    assert bars[0] == pytest.approx(np.full(width, 100.0))
    assert bars[1][: width // 2 - 1] == pytest.approx(np.full(width // 2 - 1, 100.0))
    assert not bars[1][width // 2 + 1 :].any()


def test_what_is_older_than_a_minute_is_over() -> None:
    history = History()
    history.rearrange(match(["a"], []))
    assert history.last_minute().tolist() == [0]
    seen = []
    for second in range(130):
        history.add(1000.0 + second, np.array([15.0 if second == 10 else 0.0]))
        seen.append(float(history.last_minute()[0]))
    assert seen == [15.0 if 10 <= second < 70 else 0.0 for second in range(130)]


def test_a_minute_that_has_just_begun_is_not_understated() -> None:
    history = History()
    history.rearrange(match(["a"], []))
    for second in range(4):
        history.add(1000.5 + second, np.array([10.0]))
    bars = history.snapshot().bars(np.array([0]), 1003.5, 12)
    assert bars[0].tolist() == pytest.approx([0.0] * 11 + [10.0])


def test_what_a_snapshot_tells_stays() -> None:
    history = History()
    history.rearrange(match(["a"], []))
    for second in range(5):
        history.add(float(second), np.array([10.0]))
    past = history.snapshot()
    before = past.bars(np.array([0]), 4.0, 20)
    history.rearrange(match(["b", "a"], ["a"]))
    for second in range(5, 200):
        history.add(float(second), np.array([1.0, 99.0]))
    assert past.bars(np.array([0]), 4.0, 20) == pytest.approx(before)
    assert history.snapshot().bars(np.array([0, 1]), 199.0, 4) == pytest.approx(np.array([[1.0] * 4, [99.0] * 4]))
