"""Streams: loss and jitter of every rule, from the records of all workers at once. Pure, numpy only.

A stream belongs to each rule that takes in its group and port on its interface, from any source or from its own.
Streams are added up by input, and by input and source, first: neither many rules of one input nor many sources of it
make work for each pair.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from relay.addresses import halves
from relay.cli.top.rates import EXACT_MAX
from relay.dataplane.layout import Payload
from relay.stream_growth import COUNTED, Look

SILENT_NS = 60_000_000_000  # a stream that was silent for longer has ended
LOSSES = [COUNTED.index("rtp_lost"), COUNTED.index("continuity_errors")]
LOOKED_INTO = int(Payload.RTP | Payload.MPEG_TS)
ANY = -1  # source
UNKNOWN = 1 << 30  # an address that no rule has; RULES_MAX squared is less


@dataclass(frozen=True)
class Known:
    """Addresses that rules have, and a number for each that tells it from all others."""

    firsts: Any = field(default_factory=lambda: np.zeros(1, np.int64))  # of halves, sorted
    seconds: Any = field(default_factory=lambda: np.zeros(1, np.int64))

    @classmethod
    def of(cls, addresses: Any) -> "Known":
        """From the halves of addresses, i8[n, 2]."""
        if not len(addresses):
            return cls()
        return cls(np.unique(addresses[:, 0]), np.unique(addresses[:, 1]))

    def numbers(self, firsts: Any, seconds: Any) -> Any:
        """i8[…]: of addresses as halves."""
        i = np.minimum(np.searchsorted(self.firsts, firsts), len(self.firsts) - 1)
        j = np.minimum(np.searchsorted(self.seconds, seconds), len(self.seconds) - 1)
        is_known = (self.firsts[i] == firsts) & (self.seconds[j] == seconds)
        return np.where(is_known, i * len(self.seconds) + j, UNKNOWN)


@dataclass(frozen=True)
class Inputs:
    """What rules take in: a row for each rule and interface of it."""

    size: int = 0  # rules
    rules: Any = field(default_factory=lambda: np.zeros(0, np.int64))
    keys: Any = field(default_factory=lambda: np.zeros(0, np.uint64))
    sources: Any = field(default_factory=lambda: np.zeros(0, np.int64))
    groups_known: Known = field(default_factory=Known)
    sources_known: Known = field(default_factory=Known)

    @classmethod
    def of(cls, rules: Sequence[tuple[str, int, str | None, Sequence[int]]]) -> "Inputs":
        """From the group, port, source and rings of each rule."""
        rows = [
            (number, *halves(group), port, ring, *((0, 0) if source is None else halves(source)), source is None)
            for number, (group, port, source, rings) in enumerate(rules)
            for ring in rings
        ]
        table = np.array(rows, np.int64).reshape(-1, 8)
        groups, sources = Known.of(table[:, 1:3]), Known.of(table[:, 5:7])
        named = np.where(table[:, 7], ANY, sources.numbers(table[:, 5], table[:, 6]))
        keys = _keys(groups.numbers(table[:, 1], table[:, 2]), table[:, 3], table[:, 4])
        return cls(len(rules), table[:, 0], keys, named, groups, sources)


class Faults(NamedTuple):
    """Of every rule at one moment."""

    losses: Any  # f8[rules]: RTP lost and continuity errors since the last look
    is_looked_into: Any  # b1[rules]: there is RTP or a transport stream
    jitter_ns: Any  # i8[rules]: of the worst source; -1: no RTP


def _keys(groups: Any, ports: Any, rings: Any) -> Any:
    group, port, ring = (column.astype(np.uint64) for column in (groups, ports, rings))
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
    dst_first, dst_second, port, ring, src_first, src_second = addresses.T
    groups = inputs.groups_known.numbers(dst_first, dst_second)
    senders = inputs.sources_known.numbers(src_first, src_second)
    keys, input_of = np.unique(_keys(groups, port, ring), return_inverse=True)
    by_input, by_source = _Sums(input_of, *values), _Sums(input_of << 32 | senders, *values)
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
