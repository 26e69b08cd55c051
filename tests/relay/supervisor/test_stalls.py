"""When a stall is told, and when it is none; the counters are what a worker would write."""

import os
from collections.abc import Iterator
from typing import Any

import pytest

from logging_shm import Facility, SupervisorLogging
from relay.addresses import halves
from relay.rules import Output, Rule
from relay.supervisor.fleet import Fleet
from relay.supervisor.stalls import TOLD_MAX, StallWatch
from relay.supervisor.streams import streams_by_rule
from tests.relay.supervisor.bare_fleet import bare_fleet, read_all

MS = 1_000_000
OUTPUT = (Output("239.2.2.2", 6001, "lo"),)
WATCHED = Rule(rule_id="watched", input_group="239.1.1.1", input_port=5001, outputs=OUTPUT, stall_ms=100)
PICKY = Rule(
    rule_id="picky", input_group="239.1.1.1", input_port=5001, outputs=OUTPUT, source="10.0.0.9", stall_ms=1000
)
FREE = Rule(rule_id="free", input_group="239.1.1.2", input_port=5001, outputs=OUTPUT)


class Watched:
    """A watch over a fleet of one core, on lo in a namespace of its own; no process behind it."""

    def __init__(self, fleet: Fleet, logging: SupervisorLogging) -> None:
        self.fleet = fleet
        self.ring = logging.rings[Facility.Supervisor]
        self.watch = StallWatch(fleet, logging.logger(Facility.Supervisor))
        self.stats = fleet.workers[0].stats

    def stream(self, place: int = 0, group: str = "239.1.1.1", source: str = "10.0.0.7", last_ms: int = 1) -> Any:
        """A worker has made a record."""
        record = self.stats.streams[place]
        record["src_first"], record["src_second"] = halves(source)
        record["dst_first"], record["dst_second"] = halves(group)
        record["sport"], record["dport"], record["last_ns"] = 4000 + place, 5001, last_ms * MS
        record["number"] = place + 1
        return record

    def look(self, at_ms: int) -> list[str]:
        """What is told when the worker has looked at a time, and the watch then."""
        self.stats.health["looked_ns"] = at_ms * MS
        self.watch.look()
        return [entry.message for entry in read_all(self.ring)]


@pytest.fixture
def watched() -> Iterator[Watched]:
    with bare_fleet("stalls", [0], WATCHED, PICKY, FREE) as fleet, SupervisorLogging(f"stallw{os.getpid()}") as logging:
        yield Watched(fleet, logging)


ABOUT = "Stream of rule watched from 10.0.0.7:4000"


def test_silence_is_told_once_and_so_is_its_end(watched: Watched) -> None:
    record = watched.stream(last_ms=1000)
    assert watched.watch.period_s() == 0.05
    assert watched.look(1000) == watched.look(1100) == []
    assert watched.look(1101) == [f"{ABOUT} stalled: nothing for 101 ms"]
    assert watched.look(5000) == []
    record["last_ns"], record["gaps"], record["gap_ns"] = 6000 * MS, 1, 5000 * MS
    assert watched.look(6010) == [f"{ABOUT} is back after 5000 ms"]
    assert watched.look(6020) == []


def test_a_gap_between_two_looks_is_told_with_its_end(watched: Watched) -> None:
    record = watched.stream(last_ms=1000)
    watched.look(1000)
    record["last_ns"], record["gaps"], record["gap_ns"] = 1150 * MS, 1, 120 * MS
    assert watched.look(1160) == [f"{ABOUT} stalled: nothing for 120 ms", f"{ABOUT} is back after 120 ms"]
    record["last_ns"], record["gaps"], record["gap_ns"] = 1250 * MS, 2, 99 * MS
    assert watched.look(1250) == []


def test_a_worker_that_does_not_look_has_no_stalls(watched: Watched) -> None:
    watched.stream(last_ms=1000)
    assert [watched.look(1050) for _ in range(5)] == [[]] * 5


def test_each_rule_has_its_own_limit_and_source(watched: Watched) -> None:
    watched.stream(0, source="10.0.0.9", last_ms=1000)
    watched.stream(1, group="239.1.1.2", last_ms=1000)
    assert [line.split(" from")[0] for line in watched.look(1500)] == ["Stream of rule watched"]
    assert [line.split(" from")[0] for line in watched.look(2500)] == ["Stream of rule picky"]
    by_rule = {
        rule_id: [stream.source for stream in found] for rule_id, found in streams_by_rule(watched.fleet).items()
    }
    assert by_rule == {"watched": ["10.0.0.9:4000"], "picky": ["10.0.0.9:4000"], "free": ["10.0.0.7:4001"]}


def test_a_thousand_stalls_at_once_are_a_few_lines_and_a_number(watched: Watched) -> None:
    for place in range(1000):
        watched.stream(place)
    told = watched.look(500)
    assert len(told) == TOLD_MAX + 1
    assert told[-1] == f"{1000 - TOLD_MAX} more streams stalled or came back"
