"""The stats segments as `mcrctl top` reads them: only its own relay's, read-only, and each new one in an old place."""

import os
from collections.abc import Iterator

import pytest

from relay.cli.top.rates import EXACT_MAX, Places
from relay.cli.top.segments import Segments, instance_of, same_segments
from relay.dataplane.counters import StatsSegment, segment_name
from relay.dataplane.layout import COUNT_MAX, DropCause

INSTANCE = f"top{os.getpid()}"


@pytest.fixture
def segment() -> Iterator[StatsSegment]:
    with StatsSegment.create(3, INSTANCE, -1, -1) as segment:
        yield segment


def test_names_tell_their_instance() -> None:
    for instance in (None, "tv", "dp_c1_stats", "a_b"):
        assert instance_of(segment_name(7, instance)) == instance
    assert instance_of("mcr_supervisor") is None


def test_counters_of_workers_and_rules_are_read(segment: StatsSegment) -> None:
    header = segment.header
    header["pid"], header["packets_in"], header["ring_full"], header["ring_fill_max"][2] = 42, 100, 5, 80
    header["ring_fill_percent"][:2] = 12, 34
    header["drops"][DropCause.NO_MATCH] = 7
    segment.rules[9]["packets"], segment.outputs[11]["packets"] = 60, 120
    with StatsSegment.create(3, f"{INSTANCE}x", -1, -1):  # another relay's is none of ours
        segments = Segments(INSTANCE)
        segments.refresh()
        (worker,) = segments.workers()
    assert (worker.core, worker.pid, worker.received, worker.ring_fill_percent_max) == (3, 42, 100, 80)
    assert worker.ring_fill_percent == 34
    assert {cause: n for cause, n in worker.drops.items() if n} == {"no_match": 7, "ring_full": 5}
    counts = segments.rules(Places.of([(9, [11])]))
    assert (counts.received[0], counts.sent[0]) == (60, 120)


def test_nothing_that_a_worker_may_write_is_too_strange(segment: StatsSegment) -> None:
    segment.bytes[8:] = 0xFF
    segment.header["packets_in"] = COUNT_MAX
    segments = Segments(INSTANCE)
    segments.refresh()
    (worker,) = segments.workers()
    assert (worker.received, worker.sent) == (EXACT_MAX, 0)
    assert not segments.rules(Places.of([(0, [0, 1])])).received.any()


def test_a_segment_in_the_place_of_another_is_another_relays() -> None:
    segments = Segments(INSTANCE)
    with StatsSegment.create(3, INSTANCE, -1, -1) as first:
        segments.refresh()
        before = segments.state()
        first.header["generation_seen"] = 5
        assert same_segments(before, segments.state())
        assert before != segments.state()
    segments.refresh()
    assert segments.state() == ()
    with StatsSegment.create(3, INSTANCE, -1, -1) as second:
        second.header["magic"] = 0  # it is being made
        segments.refresh()
        assert segments.state() == ()
    with StatsSegment.create(3, INSTANCE, -1, -1):
        segments.refresh()
        assert not same_segments(before, segments.state())


def test_who_watches_can_change_nothing(segment: StatsSegment) -> None:
    with StatsSegment.attach(3, INSTANCE, read_only=True) as attached:
        assert int(attached.header["core"]) == 3
        with pytest.raises(ValueError, match="read-only"):
            attached.rules["packets"] = 1
