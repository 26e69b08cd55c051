"""Loss and jitter of many rules from records of streams, compared with a loop that asks each rule of each stream."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.addresses import halves
from relay.cli.top.segments import Segments
from relay.cli.top.streams import SILENT_NS, Inputs, faults
from relay.dataplane.counters import StatsSegment
from relay.dataplane.layout import COUNT_MAX, Payload
from relay.stream_growth import Look

INSTANCE = f"topstreams{os.getpid()}"
NOW_NS = 10 * SILENT_NS
GROUPS = ["239.1.1.1", "239.255.255.255"]
SOURCES = ["10.0.0.1", "255.255.255.254"]
PORTS = [1, 65_535]
RINGS = [0, 15]

rules = st.lists(
    st.tuples(
        st.sampled_from(GROUPS),
        st.sampled_from(PORTS),
        st.sampled_from([None, *SOURCES]),
        st.lists(st.sampled_from(RINGS), unique=True),
    ),
    max_size=8,
)
streams = st.lists(
    st.tuples(
        *(st.sampled_from(GROUPS), st.sampled_from(PORTS), st.sampled_from(RINGS), st.sampled_from(SOURCES)),
        st.sampled_from([Payload.UDP, Payload.RTP, Payload.MPEG_TS, Payload.RTP | Payload.MPEG_TS]),
        *(st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 1 << 40), st.booleans()),
    ),
    max_size=20,
)


def look_at(seen: list[Any]) -> Look:
    """What a Growth tells of streams."""
    size = len(seen)
    addresses = [(*halves(group), port, ring, *halves(source)) for group, port, ring, source, *_ in seen]
    return Look(
        addresses=np.array(addresses, np.int64).reshape(size, 6),
        carried=np.array([int(kind) for *_, kind, _, _, _, _ in seen], np.int64),
        added=np.array([(lost, 7, 7, errors, 7) for *_, lost, errors, _, _ in seen], np.int64).reshape(size, 5),
        is_new=np.ones(size, bool),
        jitter_ns=np.array([jitter if kind & Payload.RTP else -1 for *_, kind, _, _, jitter, _ in seen], np.int64),
        last_ns=np.array([NOW_NS - (1 if alive else SILENT_NS) for *_, alive in seen], np.int64),
    )


@given(rules, streams, streams)
def test_what_is_told_of_each_rule_is_that_of_a_loop(ruled: list[Any], one: list[Any], two: list[Any]) -> None:
    told = faults(Inputs.of(ruled), [look_at(one), look_at(two)], NOW_NS)
    for i, (group, port, source, rings) in enumerate(ruled):
        its = [s for s in one + two if s[:2] == (group, port) and s[2] in rings and source in (None, s[3])]
        assert told.losses[i] == sum(lost + errors for *_, lost, errors, _, _ in its)
        assert told.is_looked_into[i] == any(kind for *_, kind, _, _, _, _ in its)
        alive = [jitter for *_, kind, _, _, jitter, alive in its if alive and kind & Payload.RTP]
        assert told.jitter_ns[i] == max(alive, default=-1)


@pytest.fixture
def segment() -> Iterator[StatsSegment]:
    with StatsSegment.create(3, INSTANCE, -1, -1) as segment:
        yield segment


def test_what_was_before_top_is_no_loss_of_now(segment: StatsSegment) -> None:
    record = segment.streams[7]
    record["number"], record["rtp_lost"], record["kind"], record["jitter_ns_16"] = 1, 500, Payload.RTP, 16_000
    segments = Segments(INSTANCE)
    segments.refresh()
    (first,) = segments.streams()
    record["rtp_lost"] = 503
    segments.refresh()
    (second,) = segments.streams()
    assert [look.added[:, 0].tolist() for look in (first, second)] == [[0], [3]]
    assert second.jitter_ns.tolist() == [1000]


def test_nothing_that_a_worker_may_write_is_too_strange(segment: StatsSegment) -> None:
    segments = Segments(INSTANCE)
    segments.refresh()
    segment.bytes[4096:] = 0xFF  # no record: negative numbers
    inputs = Inputs.of([(":".join(["ffff"] * 8), 65_535, None, [65_535])])
    assert faults(inputs, segments.streams(), NOW_NS).losses.tolist() == [0]
    segment.streams["number"] = COUNT_MAX
    for name in ("rtp_lost", "continuity_errors", "jitter_ns_16", "last_ns"):
        segment.streams[name] = COUNT_MAX
    told = faults(inputs, segments.streams(), NOW_NS)
    assert told.losses[0] > 0
    assert told.jitter_ns[0] == COUNT_MAX // 16
    assert told.is_looked_into[0]
