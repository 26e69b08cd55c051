"""Totals of rules never go back, whatever becomes of streams; the counters are what a worker would write."""

from collections.abc import Iterator
from typing import Any

import pytest

from relay.addresses import halves
from relay.dataplane.layout import COUNT_MAX, Payload
from relay.health import MpegTsTotals, RtpTotals
from relay.rules import Output, Rule
from relay.supervisor.fleet import Fleet
from relay.supervisor.interfaces import snapshot
from relay.supervisor.stream_totals import StreamTotals
from tests.relay.supervisor.bare_fleet import bare_fleet

OUTPUT = (Output("239.2.2.2", 6001, "lo"),)
ANY = Rule(rule_id="any", input_group="239.1.1.1", input_port=5001, outputs=OUTPUT)
PICKY = Rule(rule_id="picky", input_group="239.1.1.1", input_port=5001, outputs=OUTPUT, source="10.0.0.9")
OTHER = Rule(rule_id="other", input_group="239.1.1.2", input_port=5001, outputs=OUTPUT)


class Summed:
    """Totals over a fleet of two cores, on lo in a namespace of its own; no process behind it."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.totals = StreamTotals(fleet)
        self._number = 0

    def stream(self, core: int = 0, place: int = 0, source: str = "10.0.0.7", kind: int = Payload.RTP) -> Any:
        """A worker has made a record of a stream, in the place of another or not."""
        record = self.fleet.workers[core].stats.streams[place]
        for name in record.dtype.names:
            record[name] = 0
        record["src_first"], record["src_second"] = halves(source)
        record["dst_first"], record["dst_second"] = halves("239.1.1.1")
        record["dport"], record["kind"] = 5001, kind
        self._number += 1
        record["number"] = self._number
        return record

    def rtp(self, rule_id: str = "any") -> RtpTotals | None:
        self.totals.look()
        return self.totals.of(rule_id).rtp()


@pytest.fixture
def summed() -> Iterator[Summed]:
    with bare_fleet("totals", [0, 1], ANY, PICKY, OTHER) as fleet:
        yield Summed(fleet)


def test_streams_of_all_workers_count_for_each_rule_that_they_belong_to(summed: Summed) -> None:
    assert summed.rtp() is None
    first, second = summed.stream(0), summed.stream(1, source="10.0.0.9", kind=Payload.RTP | Payload.MPEG_TS)
    assert summed.rtp() == RtpTotals()
    first["rtp_lost"], first["rtp_reordered"] = 3, 1
    second["rtp_lost"], second["rtp_duplicates"], second["continuity_errors"], second["sync_losses"] = 4, 2, 5, 6
    assert summed.rtp() == RtpTotals(7, 1, 2)
    assert summed.rtp("picky") == RtpTotals(4, 0, 2)
    assert summed.rtp("other") is None
    assert summed.totals.of("any").mpeg_ts() == summed.totals.of("picky").mpeg_ts() == MpegTsTotals(5, 6)
    assert summed.totals.of("other").mpeg_ts() is None


def test_a_late_datagram_takes_nothing_back_and_its_loss_does_not_count_twice(summed: Summed) -> None:
    record = summed.stream()
    seen = []
    for lost in (5, 4, 5, 6):
        record["rtp_lost"] = lost
        seen.append(summed.rtp())
    assert seen == [RtpTotals(5), RtpTotals(5), RtpTotals(5), RtpTotals(6)]


def test_a_record_that_another_stream_got_leaves_its_counts(summed: Summed) -> None:
    summed.stream()["rtp_lost"] = 5
    assert summed.rtp() == RtpTotals(5)
    record = summed.stream()  # in the same place
    assert summed.rtp() == RtpTotals(5)
    record["rtp_lost"] = 2
    assert summed.rtp() == RtpTotals(7)
    record["number"] = 0  # emptied
    assert summed.rtp() == RtpTotals(7)


def test_what_a_stream_once_carried_is_told_on(summed: Summed) -> None:
    record = summed.stream()
    record["rtp_lost"] = 1
    summed.rtp()
    record["kind"] = Payload.UDP
    assert summed.rtp() == RtpTotals(1)


def test_a_rule_begins_at_nothing_and_is_forgotten_when_it_goes(summed: Summed) -> None:
    summed.stream()["rtp_lost"] = 5
    assert summed.rtp() == RtpTotals(5)
    summed.fleet.begin([OTHER], snapshot(), strict=True)
    summed.fleet.finish()
    assert summed.rtp() is None
    summed.fleet.begin([ANY, OTHER], snapshot(), strict=True)
    summed.fleet.finish()
    assert summed.rtp() == RtpTotals(), "the stream was there before the rule"
    summed.stream(place=1)["rtp_lost"] = 1
    assert summed.rtp() == RtpTotals(1)


def test_nothing_that_a_worker_may_write_is_no_count(summed: Summed) -> None:
    summed.fleet.workers[0].stats.bytes[4096:] = 0xFF
    for core in (0, 1):
        record = summed.stream(core)
        record["rtp_lost"], record["rtp_reordered"], record["kind"] = COUNT_MAX, -(1 << 63), 0xFFFF
    for _ in range(2):
        assert summed.rtp() == RtpTotals(COUNT_MAX, 0, 0)
