"""The watch over protected rules: which leg delivers, which is relayed; told once each time that it changes.

Owned by the supervisor's thread, which looks every `period_s` into the records that the worker of both legs writes
(protect.py). As with stalls, a leg is silent only if that worker has looked into its rings since.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from logging_shm import Logger
from relay.dataplane.layout import COUNT_MAX
from relay.protection import LEG_NAMES, LegHealth, ProtectionHealth, silent_after_ms
from relay.rules import Leg, Rule, legs
from relay.supervisor.fleet import Fleet
from relay.supervisor.worker import Worker

PERIOD_S_MIN, PERIOD_S_MAX = 0.05, 1.0
TOLD_MAX = 40  # of one look: an interface that goes down may take a leg from hundreds of rules
NS_PER_MS = 1_000_000


@dataclass
class Known:
    """What was told of a rule."""

    switches: int
    is_silent: list[bool] = field(default_factory=lambda: [False, False])
    silent_since_ns: list[int] = field(default_factory=lambda: [0, 0])


def _count(number: Any) -> int:
    return min(max(int(number), 0), COUNT_MAX)


def silence_ns(record: Any, leg: int, worker: Worker) -> int:
    """How long nothing has come by a leg, as far as its worker can know. A worker may have written anything."""
    heard_ns = max(int(record["legs"][leg]["last_ns"]), int(record["begun_ns"]), int(worker.started_s * 1e9))
    return max(int(worker.stats.health["looked_ns"]) - heard_ns, 0)


def health_of(fleet: Fleet, rule: Rule) -> ProtectionHealth | None:
    """What is told of a rule's two legs; None of a rule that has but one."""
    worker = fleet.rings.reader()
    if rule.protection is None or worker is None:
        return None
    record = worker.stats.protections[fleet.protections.number_of(rule)].copy()
    is_seamless = rule.protection == "seamless"
    told = []
    for number, leg in enumerate(legs(rule)):
        counters = record["legs"][number]
        packets, expected = _count(counters["packets"]), _count(counters["expected"])
        silent_ns = silence_ns(record, number, worker)
        came = int(counters["last_ns"]) > 0
        told.append(
            LegHealth(
                input=str(leg),
                delivers=came and silent_ns <= silent_after_ms(rule) * NS_PER_MS,
                silent_ms=silent_ns / NS_PER_MS if came else None,
                packets=packets,
                firsts=_count(counters["firsts"]),
                missing=max(expected - packets, 0) if is_seamless and expected else None,
            )
        )
    return ProtectionHealth(
        mode=rule.protection,
        active=None if is_seamless else LEG_NAMES[int(record["active"]) & 1],
        switches=_count(record["switches"]),
        withheld=_count(record["withheld"]),
        not_rtp=_count(record["not_rtp"]),
        legs=told,
    )


class ProtectionWatch:
    """Tells of legs that fall silent and come back, and of fail-over and its end."""

    def __init__(self, fleet: Fleet, log: Logger) -> None:
        self._fleet = fleet
        self._log = log
        self._known: dict[int, Known] = {}  # by record
        self._told = 0

    def period_s(self) -> float:
        """When to look again: twice in the shortest silence that counts."""
        shortest_ms = min((silent_after_ms(rule) for rule in self._rules()), default=0)
        return min(max(shortest_ms / 2000, PERIOD_S_MIN), PERIOD_S_MAX) if shortest_ms else PERIOD_S_MAX

    def _rules(self) -> Iterator[Rule]:
        return (planned.rule for planned in self._fleet.plan.rules if planned.rule.secondary is not None)

    def look(self) -> None:
        """Tell what has changed since the last look."""
        former, self._known, self._told = self._known, {}, 0
        worker = self._fleet.rings.reader()
        if worker is None:
            return
        for rule in self._rules():
            number = self._fleet.protections.number_of(rule)
            record = worker.stats.protections[number].copy()
            is_second = int(record["active"]) & 1
            known = former.get(number) or Known(_count(record["switches"]) - is_second)
            if rule.protection == "failover":
                self._tell_switches(rule, known, _count(record["switches"]), is_second)
            known.switches = _count(record["switches"])
            if worker.running:
                for index, leg in enumerate(legs(rule)):
                    self._judge(rule, known, index, leg, record, silence_ns(record, index, worker))
            self._known[number] = known
        if self._told > TOLD_MAX:
            self._log.warning(f"{self._told - TOLD_MAX} more legs of protected rules fell silent or came back")

    def _tell_switches(self, rule: Rule, known: Known, switches: int, is_second: int) -> None:
        """Of many since the last look, the last two: there and back."""
        new = switches - known.switches
        first, second = legs(rule)
        if new > 0 and (is_second or new > 1):
            line = (
                f"Rule {rule.rule_id} went over to its secondary leg {second}: nothing came by the primary for longer"
            )
            self._tell(f"{line} than {rule.stall_ms} ms", rule, is_over=False)
        if new > 0 and not is_second:
            self._tell(f"Rule {rule.rule_id} is back on its primary leg {first}", rule, is_over=True)

    def _judge(self, rule: Rule, known: Known, index: int, leg: Leg, record: Any, silent_ns: int) -> None:
        """Compare a leg with what was told, tell what is new, and remember."""
        is_silent = silent_ns > silent_after_ms(rule) * NS_PER_MS
        if is_silent == known.is_silent[index]:
            return
        known.is_silent[index] = is_silent
        about = f"{LEG_NAMES[index]} leg {leg} of rule {rule.rule_id}"
        last_ns = int(record["legs"][index]["last_ns"])
        if is_silent:
            known.silent_since_ns[index] = last_ns
            self._tell(f"Nothing comes by the {about}: it is not protected", rule, is_over=False)
            return
        since_ns = known.silent_since_ns[index]
        again = f" again after {(last_ns - since_ns) // NS_PER_MS} ms" if 0 < since_ns < last_ns else ""
        self._tell(f"The {about} delivers{again}", rule, is_over=True)

    def _tell(self, line: str, rule: Rule, is_over: bool) -> None:
        self._told += 1
        if self._told > TOLD_MAX:
            return
        (self._log.notice if is_over else self._log.warning)(line, rule=rule.rule_id)
