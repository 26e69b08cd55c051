"""Streams: loss and jitter of every rule, from the records of all workers at once. Pure, numpy only.

A stream belongs to each rule that takes in its group and port on its interface, from any source or from its own.
Streams are added up by input, and by input and source, first: neither many rules of one input nor many sources of it
make work for each pair.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from relay.cli.top.rates import EXACT_MAX
from relay.dataplane.layout import Payload
from relay.rules import address_number
from relay.stream_growth import COUNTED, Look

SILENT_NS = 60_000_000_000  # a stream that was silent for longer has ended
LOSSES = [COUNTED.index("rtp_lost"), COUNTED.index("continuity_errors")]
LOOKED_INTO = int(Payload.RTP | Payload.MPEG_TS)
ANY = -1  # source


@dataclass(frozen=True)
class Inputs:
    """What rules take in: a row for each rule and interface of it."""

    size: int = 0  # rules
    rules: Any = field(default_factory=lambda: np.zeros(0, np.int64))
    keys: Any = field(default_factory=lambda: np.zeros(0, np.uint64))
    sources: Any = field(default_factory=lambda: np.zeros(0, np.int64))

    @classmethod
    def of(cls, rules: Sequence[tuple[str, int, str | None, Sequence[int]]]) -> "Inputs":
        """From the group, port, source and rings of each rule."""
        rows = [
            (number, address_number(group), port, ring, ANY if source is None else address_number(source))
            for number, (group, port, source, rings) in enumerate(rules)
            for ring in rings
        ]
        table = np.array(rows, np.int64).reshape(-1, 5)
        return cls(len(rules), table[:, 0], _keys(table[:, 1:4]), table[:, 4])


class Faults(NamedTuple):
    """Of every rule at one moment."""

    losses: Any  # f8[rules]: RTP lost and continuity errors since the last look
    is_looked_into: Any  # b1[rules]: there is RTP or a transport stream
    jitter_ns: Any  # i8[rules]: of the worst source; -1: no RTP


def _keys(addresses: Any) -> Any:
    group, port, ring = (addresses[:, i].astype(np.uint64) for i in range(3))
    return group << np.uint64(32) | port << np.uint64(16) | ring


class _Sums:
    """Streams added up by what they have in common."""

    def __init__(self, numbers: Any, losses: Any, is_looked_into: Any, jitter_ns: Any) -> None:
        self.numbers, place = np.unique(numbers, return_inverse=True)
        size = len(self.numbers)
        self.losses = np.bincount(place, losses, size)
        self.is_looked_into = np.bincount(place, is_looked_into, size) > 0
        self.jitter_ns = np.full(size, -1, np.int64)
        np.maximum.at(self.jitter_ns, place, jitter_ns)

    def find(self, numbers: Any) -> tuple[Any, Any]:
        """Where numbers are, and whether they are there."""
        at = np.minimum(np.searchsorted(self.numbers, numbers), len(self.numbers) - 1)
        return at, self.numbers[at] == numbers


def faults(inputs: Inputs, looks: Sequence[Look], now_ns: int) -> Faults:
    """What the streams of all workers tell of each rule."""
    told = Faults(np.zeros(inputs.size), np.zeros(inputs.size, bool), np.full(inputs.size, -1, np.int64))
    if not sum(len(look.carried) for look in looks) or not len(inputs.rules):
        return told
    addresses = np.concatenate([look.addresses for look in looks])
    added = np.concatenate([look.added for look in looks])[:, LOSSES]
    is_alive = now_ns - np.concatenate([look.last_ns for look in looks]) < SILENT_NS
    values = (
        np.minimum(added, EXACT_MAX).sum(axis=1),
        np.concatenate([look.carried for look in looks]) & LOOKED_INTO != 0,
        np.where(is_alive, np.concatenate([look.jitter_ns for look in looks]), -1),
    )
    keys, input_of = np.unique(_keys(addresses), return_inverse=True)
    by_input, by_source = _Sums(input_of, *values), _Sums(input_of << 32 | addresses[:, 3], *values)
    at = np.minimum(np.searchsorted(keys, inputs.keys), len(keys) - 1)
    is_of_any = inputs.sources == ANY
    for sums, numbers, is_its in ((by_input, at, is_of_any), (by_source, at << 32 | inputs.sources, ~is_of_any)):
        place, is_there = sums.find(numbers)
        rows = (is_there & is_its & (keys[at] == inputs.keys)).nonzero()[0]
        rule, place = inputs.rules[rows], place[rows]
        np.add.at(told.losses, rule, sums.losses[place])
        np.logical_or.at(told.is_looked_into, rule, sums.is_looked_into[place])
        np.maximum.at(told.jitter_ns, rule, sums.jitter_ns[place])
    return told
