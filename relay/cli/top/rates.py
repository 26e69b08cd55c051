"""Rates: from the counters of two moments to what happened between them, for all rules at once. Pure, numpy only.

Counters are read while workers write them, and a worker that was taken over may leave any number there: what comes out
is never negative and never more than EXACT_MAX a counter.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

EXACT_MAX = 1 << 53  # what a float64 holds exactly
HISTORY_S = 60.0
BAR_S_MIN = 1e-3  # a span that has lasted for less tells nothing yet
HISTORY_STEP_S = 0.9  # between two moments that are kept: less than a second, as ticks come a little early, too


@dataclass(frozen=True)
class Places:
    """Where in a stats segment the counters of each rule are. Every rule has at least one output."""

    rule_slots: Any  # i8[rules]
    output_slots: Any  # i8[outputs], those of the first rule first
    first_outputs: Any  # i8[rules], where those of each rule begin in output_slots

    @classmethod
    def of(cls, slots: Sequence[tuple[int, Sequence[int]]]) -> "Places":
        """From the slot of each rule and those of its outputs."""
        counts = np.array([len(outputs) for _, outputs in slots], np.int64)
        return cls(
            np.array([rule for rule, _ in slots], np.int64),
            np.array([slot for _, outputs in slots for slot in outputs], np.int64),
            np.concatenate(([0], np.cumsum(counts)[:-1])) if len(slots) else counts,
        )


class Counts(NamedTuple):
    """The counters of every rule at one moment, all workers' added up: i8[rules] each."""

    received: Any  # datagrams that matched
    received_bytes: Any  # of payload
    sent: Any  # datagrams that left, through all outputs
    sent_bytes: Any
    drops: Any  # datagrams that an output lost, or that were over the rule's limit
    last_ns: Any  # CLOCK_MONOTONIC of the last datagram, 0 for none


def _sane(values: Any) -> Any:
    return np.clip(values, 0, EXACT_MAX)


def count(segments: Sequence[tuple[Any, Any]], places: Places) -> Counts:
    """Add up RULE_STATS and OUTPUT_STATS of each worker."""
    size = len(places.rule_slots)
    total = Counts(*(np.zeros(size, np.int64) for _ in Counts._fields))
    if not size:
        return total
    for rules, outputs in segments:
        of_rules, of_outputs = rules[places.rule_slots], outputs[places.output_slots]
        total.received[:] += _sane(of_rules["packets"])
        total.received_bytes[:] += _sane(of_rules["bytes"])
        total.sent[:] += np.add.reduceat(_sane(of_outputs["packets"]), places.first_outputs)
        total.sent_bytes[:] += np.add.reduceat(_sane(of_outputs["bytes"]), places.first_outputs)
        total.drops[:] += _sane(of_rules["drops_rate_limit"])
        for cause in ("drops_ttl", "drops_full", "drops_error"):
            total.drops[:] += np.add.reduceat(_sane(of_outputs[cause]), places.first_outputs)
        np.maximum(total.last_ns, of_rules["last_ns"], out=total.last_ns)
    return total


def grown(newer: Any, older: Any) -> Any:
    """What was counted between two moments; counters that went back began again at 0."""
    return np.where(newer >= older, newer - older, newer)


class Rates(NamedTuple):
    """What happened to every rule in a second: f8[rules] each."""

    received: Any
    sent: Any
    sent_bits: Any  # of payload, as get-stats has it
    drops: Any


def rates(newer: Counts, older: Counts, elapsed_s: float) -> Rates:
    """The rates between two moments of the same rules."""
    per_second = 1 / elapsed_s if elapsed_s > 0 else 0.0
    return Rates(
        received=grown(newer.received, older.received) * per_second,
        sent=grown(newer.sent, older.sent) * per_second,
        sent_bits=grown(newer.sent_bytes, older.sent_bytes) * (8 * per_second),
        drops=grown(newer.drops, older.drops) * per_second,
    )


def match(ids: Sequence[str], former: Sequence[str]) -> Any:
    """For each of the rules the index that it had among the former ones, -1 for a new one: i8[rules]."""
    index = {rule_id: i for i, rule_id in enumerate(former)}
    return np.array([index.get(rule_id, -1) for rule_id in ids], np.int64)


def rearranged(values: Any, former: Any, missing: Any) -> Any:
    """Values of former rules in the order of the present ones; new rules have those of `missing`."""
    if not len(values):
        return missing.copy()
    return np.where(former >= 0, values[former], missing)


class History:
    """How much was counted of each rule, at moments of the last minute. What it gives away never changes."""

    def __init__(self) -> None:
        self._times: deque[float] = deque()
        self._totals: deque[Any] = deque()  # f8[rules]
        self._now: Any = np.zeros(0)

    def rearrange(self, former: Any) -> None:
        """Go over to other rules, see `match`."""
        zeros = np.zeros(len(former))
        self._now = rearranged(self._now, former, zeros)
        self._totals = deque(rearranged(totals, former, self._now) for totals in self._totals)

    def add(self, time_s: float, received: Any) -> None:
        """Note what each rule received, or lost, since the last call: i8[rules]."""
        self._now = self._now + received
        if self._times and time_s - self._times[-1] < HISTORY_STEP_S:
            return
        self._times.append(time_s)
        self._totals.append(self._now)
        while len(self._times) > 2 and self._times[1] <= time_s - HISTORY_S:
            self._times.popleft()
            self._totals.popleft()

    def last_minute(self) -> Any:
        """What was counted in it, as far as that is known: f8[rules]."""
        return self._now - self._totals[0] if self._totals else np.zeros_like(self._now)

    def snapshot(self) -> "Past":
        """The past as it is known now."""
        return Past(np.array(self._times), tuple(self._totals))


class Past(NamedTuple):
    """What a History knew at one moment."""

    times_s: Any  # f8[moments]
    totals: tuple[Any, ...]  # f8[rules] each

    def bars(self, rows: Any, now_s: float, width: int) -> Any:
        """Datagrams a second of some rules in `width` spans of the last minute: f8[rows, width].

        Spans begin at multiples of their length, so that bars keep their heights as they move; the last one is as long
        as it has lasted.
        """
        if len(self.times_s) < 2 or not len(rows):
            return np.zeros((len(rows), width))
        span_s = HISTORY_S / width
        last_s = min(now_s, float(self.times_s[-1]))
        first_of_last_s = np.floor((last_s - BAR_S_MIN) / span_s) * span_s
        edges_s = np.append(first_of_last_s - span_s * np.arange(width - 1, -1, -1), last_s)
        totals = np.stack([moment[rows] for moment in self.totals])
        after = np.clip(np.searchsorted(self.times_s, edges_s), 1, len(self.times_s) - 1)
        lengths_s = self.times_s[after] - self.times_s[after - 1]
        share = np.clip((edges_s - self.times_s[after - 1]) / lengths_s, 0, 1)[:, None]
        at_edges = totals[after - 1] * (1 - share) + totals[after] * share
        known_s = np.diff(np.clip(edges_s, self.times_s[0], None))  # nothing is known of what was before
        return (np.diff(at_edges, axis=0) / np.maximum(known_s, BAR_S_MIN)[:, None]).T
