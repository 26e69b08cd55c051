"""Which PROTECTION record is whose, and how what it holds goes from worker to worker. The supervisor's.

A record is written by the worker that reads the rule's two legs (protect.py), in its own stats segment. Here each
protected rule gets a number, the same in every segment; a worker that takes the rings over from another, or from one of
a former supervisor, is given what that one knew, so that nothing leaves twice.
"""

import hashlib
import time
from collections.abc import Collection
from typing import Any

import msgspec

from relay.dataplane.counters import StatsHeader, StatsSegment
from relay.dataplane.layout import FAILOVER, PROTECTIONS_MAX, SEAMLESS
from relay.dataplane.protect import empty_record, take_back
from relay.dataplane.table import TableProtection
from relay.errors import RuleError
from relay.rules import Rule, legs

MODES = {"seamless": SEAMLESS, "failover": FAILOVER}


def identity(rule: Rule) -> int:
    """A number for a rule and its legs: one that is replaced by another with other legs begins anew."""
    content = msgspec.json.encode((rule.rule_id, rule.protection, legs(rule)))
    return int.from_bytes(hashlib.sha256(content).digest()[:7], "big") + 1


class Protections:
    """Numbers of records, by the identities of rules."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self._free = list(range(PROTECTIONS_MAX - 1, -1, -1))

    def check_room(self, rules: Collection[Rule]) -> None:
        """Raises RuleError when there are too few records for these beside those whose rules are about to go."""
        if len({identity(rule) for rule in rules} - self._numbers.keys()) > len(self._free):
            raise RuleError("too many protected rules change at once: change them in several steps")

    def follow(self, rules: Collection[Rule], segments: Collection[StatsSegment]) -> list[int]:
        """Give new rules records, of which nothing is known; return the numbers of rules that are gone.

        They are free when they are given back. `check_room` came before.
        """
        wanted = {identity(rule) for rule in rules}
        gone = [self._numbers.pop(rule) for rule in self._numbers.keys() - wanted]
        for rule in wanted - self._numbers.keys():
            number = self._numbers[rule] = self._free.pop()
            record = empty_record()
            record["identity"], record["begun_ns"] = rule, time.monotonic_ns()
            for segment in segments:
                segment.protections[number] = record
        return gone

    def give_back(self, numbers: Collection[int]) -> None:
        """No table names these any more."""
        self._free += numbers

    def number_of(self, rule: Rule) -> int:
        """The record of an active rule."""
        return self._numbers[identity(rule)]

    def of_table(self, rule: Rule, leg: int) -> TableProtection | None:
        """What the data plane must know of a leg; None of a rule that has but one."""
        if rule.protection is None:
            return None
        return TableProtection(self.number_of(rule), leg, MODES[rule.protection], (rule.stall_ms or 0) * 1_000_000)

    def inherit(self, heir: StatsSegment, former: StatsHeader, with_counts: bool) -> None:
        """A worker goes on with what another has known that has ended.

        Counts begin at 0 under a new supervisor, as all do.
        """
        found = former.read_protections()
        if found is None:
            return
        records, journal = found
        take_back(records, journal)
        by_identity: dict[int, Any] = {int(record["identity"]): record for record in records if record["identity"]}
        for rule, number in self._numbers.items():
            if rule in by_identity:
                heir.protections[number] = by_identity[rule] if with_counts else _uncounted(by_identity[rule])


def _uncounted(record: Any) -> Any:
    """A record without its counts."""
    for name in ("switches", "withheld", "not_rtp"):
        record[name] = 0
    for name in ("packets", "firsts", "expected"):
        record["legs"][name] = 0
    return record
