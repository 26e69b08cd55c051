"""Stalls: senders of a rule that have been silent for longer than the rule's `stall_ms`.

Owned by the supervisor's thread, which looks every `period_s`. A worker writes when a stream's last datagram came, when
it last looked into its rings, and each gap of GAP_NS_MIN and more when that is over; all by CLOCK_MONOTONIC. So a gap
between two looks is told too, and one in which the worker stood still is none: that would be in its rings.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from logging_shm import Logger
from relay.addresses import Halves, endpoint, halves, text_of
from relay.health import used_records
from relay.rules import Rule
from relay.supervisor.fleet import Fleet
from relay.supervisor.worker import Worker

PERIOD_S_MIN, PERIOD_S_MAX = 0.05, 1.0
TOLD_MAX = 20  # of one look: anybody may send from a thousand ports, once from each
ADDRESSES = ("src_first", "src_second", "dst_first", "dst_second")
FIELDS = ("number", *ADDRESSES, "sport", "dport", "ring", "last_ns", "gaps", "gap_ns")
NS_PER_MS = 1_000_000

Input = tuple[Halves, int, int]  # group, port, ring


@dataclass
class Known:
    """What was seen of a stream before."""

    last_ns: int
    gaps: int
    is_stalled: bool = False


class StallWatch:
    """Tells of stalls and their ends, once each."""

    def __init__(self, fleet: Fleet, log: Logger) -> None:
        self._fleet = fleet
        self._log = log
        self._generation = -1
        self._watched: dict[Input, list[Rule]] = {}
        self._known: dict[tuple[int, int, str], Known] = {}  # by core, stream number, rule
        self._told = 0

    def period_s(self) -> float:
        """When to look again: twice in the shortest stall that a rule has."""
        self._follow_rules()
        shortest_ms = min((rule.stall_ms or 0 for rules in self._watched.values() for rule in rules), default=0)
        return min(max(shortest_ms / 2000, PERIOD_S_MIN), PERIOD_S_MAX) if shortest_ms else PERIOD_S_MAX

    def _follow_rules(self) -> None:
        if self._generation == self._fleet.generation:
            return
        self._generation = self._fleet.generation
        watched: dict[Input, list[Rule]] = defaultdict(list)
        for planned in self._fleet.plan.rules:
            rule = planned.rule
            if rule.stall_ms is not None and rule.secondary is None:  # silent legs are told by protection_watch.py
                for leg, number in self._fleet.rings.inputs_of(planned):
                    watched[halves(leg.group), leg.port, number].append(rule)
        self._watched = dict(watched)

    def look(self) -> None:
        """Tell of every stream that stalled, or came back, since the last look."""
        self._follow_rules()
        former, self._known, self._told = self._known, {}, 0
        for worker in self._fleet.workers if self._watched else ():
            looked_ns = int(worker.stats.health["looked_ns"])  # before the streams: what comes meanwhile is no silence
            for stream, rule, sender in self._streams(worker):
                key = (worker.core, stream["number"], rule.rule_id)
                silent_ns = looked_ns - stream["last_ns"]
                known = former.get(key) or Known(stream["last_ns"], stream["gaps"])
                self._judge(known, stream, silent_ns, rule, sender)
                self._known[key] = known
        if self._told > TOLD_MAX:
            self._log.warning(f"{self._told - TOLD_MAX} more streams stalled or came back")

    def _streams(self, worker: Worker) -> Iterator[tuple[dict[str, int], Rule, str]]:
        """The streams of a worker that rules watch; a worker may have written anything."""
        for values in worker.stats.streams[used_records(worker.stats)][list(FIELDS)].tolist():
            stream: dict[str, int] = dict(zip(FIELDS, values, strict=True))
            source = (stream["src_first"], stream["src_second"])
            group = (stream["dst_first"], stream["dst_second"])
            for rule in self._watched.get((group, stream["dport"], stream["ring"]), ()):
                if rule.source is None or halves(rule.source) == source:
                    yield stream, rule, endpoint(text_of(*source), stream["sport"])

    def _judge(self, known: Known, stream: dict[str, int], silent_ns: int, rule: Rule, sender: str) -> None:
        """Compare with the last look, tell what is new, and remember."""
        stall_ns = (rule.stall_ms or 0) * NS_PER_MS
        had_gap = stream["gaps"] != known.gaps and stream["gap_ns"] > stall_ns
        about = f"Stream of rule {rule.rule_id} from {sender}"
        if not known.is_stalled and (silent_ns > stall_ns or had_gap):
            nothing_ms = max(silent_ns, stream["gap_ns"] if had_gap else 0) // NS_PER_MS
            self._tell(f"{about} stalled: nothing for {nothing_ms} ms", rule, is_over=False)
            known.is_stalled = True
        if known.is_stalled and stream["last_ns"] != known.last_ns and silent_ns <= stall_ns:
            gap_ms = (stream["gap_ns"] if had_gap else stream["last_ns"] - known.last_ns) // NS_PER_MS
            self._tell(f"{about} is back after {gap_ms} ms", rule, is_over=True)
            known.is_stalled = False
        known.last_ns, known.gaps = stream["last_ns"], stream["gaps"]

    def _tell(self, line: str, rule: Rule, is_over: bool) -> None:
        self._told += 1
        if self._told > TOLD_MAX:
            return
        (self._log.notice if is_over else self._log.warning)(line, rule=rule.rule_id)
