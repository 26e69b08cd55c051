"""When a rule is said to be over its limit; the counters are what workers would write."""

import os
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from logging_shm import Facility, SupervisorLogging
from relay.rules import Output, Rule
from relay.supervisor.fleet import Fleet
from relay.supervisor.guards import QUIET_S, TOLD_MAX, GuardWatch
from tests.relay.supervisor.bare_fleet import bare_fleet, install, read_all

OUTPUT = (Output("239.2.2.2", 6001, "lo"),)
TV = Rule(rule_id="tv", input_group="239.1.1.1", input_port=5001, outputs=OUTPUT, max_pps=1000)
BOTH = Rule(rule_id="both", input_group="239.1.1.2", input_port=5001, outputs=OUTPUT, max_pps=5, max_bps=8000)
FREE = Rule(rule_id="free", input_group="239.1.1.3", input_port=5001, outputs=OUTPUT)


class Watched:
    """A watch over a fleet of two cores, on lo in a namespace of its own; no process behind it."""

    def __init__(self, fleet: Fleet, logging: SupervisorLogging) -> None:
        self.fleet = fleet
        self.ring = logging.rings[Facility.Supervisor]
        self.watch = GuardWatch(fleet, logging.logger(Facility.Supervisor))

    def drop(self, rule_id: str, core: int = 0, count: int = 1) -> None:
        """A worker drops datagrams of a rule."""
        self.fleet.workers[core].stats.rules["drops_rate_limit"][self.fleet.rule_slots[rule_id]] += count

    def cell(self, rule_id: str) -> Any:
        """The buckets of a rule."""
        return self.fleet._guard_cells.cells[self.fleet.rule_slots[rule_id]]

    def look(self, now_s: float) -> list[str]:
        """What is told at a time."""
        self.watch.look(now_s)
        return [f"[{entry.severity.name}] {entry.message}" for entry in read_all(self.ring)]


@pytest.fixture
def watched() -> Iterator[Watched]:
    with bare_fleet("guards", [0, 1], TV, BOTH, FREE) as fleet, SupervisorLogging(f"guardw{os.getpid()}") as logging:
        yield Watched(fleet, logging)


TV_OVER = (
    "[Warning] Rule tv is over its limit of 1000 packets/s: {} datagrams dropped; see mcrctl streams, or raise max_pps"
)
TV_BACK = "[Notice] Rule tv is back under its limit: {} datagrams were dropped"


def test_an_excess_is_told_once_and_so_is_its_end(watched: Watched) -> None:
    assert watched.look(0) == []
    watched.drop("tv", 0, 3)
    watched.drop("tv", 1, 4)
    assert watched.look(1) == [TV_OVER.format(7)]
    for second in range(2, 30):
        watched.drop("tv")
        assert watched.look(second) == []
    assert watched.look(29 + QUIET_S - 1) == []
    assert watched.look(29 + QUIET_S) == [TV_BACK.format(35)]
    assert watched.look(100) == []
    watched.drop("tv")
    assert watched.look(101) == [TV_OVER.format(1)]


def test_a_rule_that_goes_over_and_under_all_the_time_is_told_of_once(watched: Watched) -> None:
    watched.look(0)
    told = []
    for second in range(1, 100, 5):
        watched.drop("tv")
        told += watched.look(second)
        told += watched.look(second + 1)
    assert told == [TV_OVER.format(1)]


def test_both_limits_are_named(watched: Watched) -> None:
    watched.look(0)
    watched.drop("both", 0, 9)
    assert watched.look(1) == [
        "[Warning] Rule both is over its limit of 5 packets/s and 8000 bit/s: 9 datagrams dropped; "
        "see mcrctl streams, or raise max_pps or max_bps"
    ]


def test_another_limit_is_judged_anew_and_no_limit_not_at_all(watched: Watched) -> None:
    watched.look(0)
    watched.drop("tv")
    assert len(watched.look(1)) == 1
    watched.drop("tv")
    install(watched.fleet, msgspec.structs.replace(TV, max_pps=2000), BOTH, FREE)
    assert watched.look(2) == []
    watched.drop("tv")
    assert watched.look(3) == [TV_OVER.format(1).replace("1000 packets", "2000 packets")]
    install(watched.fleet, msgspec.structs.replace(TV, max_pps=None), BOTH, FREE)
    assert watched.look(4) == watched.look(60) == []
    install(watched.fleet, TV, BOTH, FREE)
    assert watched.look(61) == watched.look(90) == []


def test_nonsense_of_a_worker_is_a_count(watched: Watched) -> None:
    watched.look(0)
    drops = watched.fleet.workers[1].stats.rules["drops_rate_limit"]
    drops[:] = -(1 << 63)
    assert watched.look(1) == []
    drops[:] = (1 << 63) - 1
    assert [line.split()[2] for line in watched.look(2)] == ["tv", "both"]


def test_many_at_once_are_counted(watched: Watched) -> None:
    rules = [msgspec.structs.replace(TV, rule_id=f"r{n}", input_port=1 + n) for n in range(TOLD_MAX + 5)]
    install(watched.fleet, *rules)
    watched.look(0)
    for rule in rules:
        watched.drop(rule.rule_id)
    told = watched.look(1)
    assert len(told) == TOLD_MAX + 1
    assert told[-1] == "[Warning] 5 more rules went over their limits, or back under them"


def test_buckets_are_full_after_another_limit_a_removed_rule_and_a_workers_end(watched: Watched) -> None:
    """And only then: a change elsewhere leaves a rule's debt as it is."""
    watched.cell("tv")["packets_due"] = watched.cell("both")["bits_due"] = 1 << 62
    install(watched.fleet, TV, BOTH)
    assert int(watched.cell("tv")["packets_due"]) == int(watched.cell("both")["bits_due"]) == 1 << 62
    install(watched.fleet, msgspec.structs.replace(TV, max_pps=999), BOTH)
    assert int(watched.cell("tv")["packets_due"]) == 0
    assert int(watched.cell("both")["bits_due"]) == 1 << 62
    cell = watched.cell("both")
    install(watched.fleet, TV)
    assert int(cell["bits_due"]) == 0
    watched.cell("tv")["packets_due"] = 1 << 62
    watched.fleet.worker_gone(watched.fleet.workers[0])
    assert int(watched.cell("tv")["packets_due"]) == 0
