"""Faults of streams by rule: sums over all streams that a rule has ever had, which never go back.

Owned by the supervisor's thread, which looks once a second. What a stream adds is found by relay/stream_growth.py; most
looks find nothing that is new, and cost no more than that.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from relay.addresses import Halves, halves
from relay.dataplane.layout import COUNT_MAX, Payload
from relay.health import MpegTsTotals, RtpTotals
from relay.stream_growth import COUNTED, RTP_COUNTED, Growth
from relay.supervisor.fleet import Fleet

Input = tuple[Halves, int, int, Halves | None]  # group, port, ring, source if it is one's own


@dataclass
class Totals:
    """What a rule's streams have carried, and what was wrong with them, by COUNTED."""

    carried: int = 0
    counts: list[int] = field(default_factory=lambda: [0] * len(COUNTED))

    def add(self, carried: int, counts: Sequence[int]) -> None:
        """Take in what a stream has added."""
        self.carried |= carried
        self.counts = [min(total + count, COUNT_MAX) for total, count in zip(self.counts, counts, strict=True)]

    def rtp(self) -> RtpTotals | None:
        """None before the first RTP."""
        return RtpTotals(*self.counts[:RTP_COUNTED]) if self.carried & Payload.RTP else None

    def mpeg_ts(self) -> MpegTsTotals | None:
        """None before the first transport stream."""
        return MpegTsTotals(*self.counts[RTP_COUNTED:]) if self.carried & Payload.MPEG_TS else None


class StreamTotals:
    """The totals of every rule that has had streams, since it was added."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._generation = -1
        self._inputs: dict[Input, list[str]] = {}  # rules
        self._growths: dict[int, Growth] = {}  # by core
        self._totals: dict[str, Totals] = {}  # by rule

    def of(self, rule_id: str) -> Totals:
        """As of the last look."""
        return self._totals.get(rule_id) or Totals()

    def look(self) -> None:
        """Count what is new since the last look.

        By input first: a thousand streams of an input that a thousand rules have are no million sums.
        """
        has_new_rules = self._follow_rules()  # which are told what streams carry that have been there before
        added: dict[Input, Totals] = defaultdict(Totals)
        for worker in self._fleet.workers:
            growth = self._growths.get(worker.core)
            if growth is None or growth.segment is not worker.stats:
                growth = self._growths[worker.core] = Growth(worker.stats)
            look = growth.look()
            is_told = look.is_new | has_new_rules
            news = [array[is_told].tolist() for array in (look.addresses, look.carried, look.added)]
            for address, carried, counts in zip(*news, strict=True):
                group, source, (port, ring) = (address[0], address[1]), (address[4], address[5]), address[2:4]
                keys: tuple[Input, ...] = ((group, port, ring, None), (group, port, ring, source))
                for key in keys:
                    if key in self._inputs:
                        added[key].add(carried, counts)
        for key, totals in added.items():
            for rule_id in self._inputs[key]:
                self._totals.setdefault(rule_id, Totals()).add(totals.carried, totals.counts)

    def _follow_rules(self) -> bool:
        """Whether they have changed."""
        if self._generation == self._fleet.generation:
            return False
        self._generation = self._fleet.generation
        inputs: dict[Input, list[str]] = defaultdict(list)
        for planned in self._fleet.plan.rules:
            for leg, number in self._fleet.rings.inputs_of(planned):
                source = None if leg.source is None else halves(leg.source)
                inputs[halves(leg.group), leg.port, number, source].append(planned.rule.rule_id)
        self._inputs = dict(inputs)
        present = {planned.rule.rule_id for planned in self._fleet.plan.rules}
        self._totals = {rule_id: totals for rule_id, totals in self._totals.items() if rule_id in present}
        return True
