"""Rules over their limits (`max_pps`, `max_bps`): told once when it begins, and once when it is over.

Owned by the supervisor's thread, which looks once a second at what the workers have counted; the data path tells
nothing itself. A rule is back under its limit when nothing was dropped for QUIET_S: one that goes over and under the
limit all the time is told of once.
"""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from logging_shm import Logger
from relay.rules import Rule, limits_of
from relay.supervisor.fleet import Fleet

QUIET_S = 10.0
TOLD_MAX = 20  # of one look


@dataclass
class Excess:
    """Of a rule that is over its limit."""

    dropped: int  # since it began
    last_s: float  # when the last drop was seen


class GuardWatch:
    """Tells of rules that exceed their limits."""

    def __init__(self, fleet: Fleet, log: Logger) -> None:
        self._fleet = fleet
        self._log = log
        self._generation = -1
        self._guarded: list[Rule] = []
        self._slots: Any = np.zeros(0, np.int64)
        self._counted: dict[str, int] = {}  # at the last look, by rule
        self._over: dict[str, Excess] = {}
        self._told = 0

    def look(self, now_s: float | None = None) -> None:
        """Tell what has changed since the last look."""
        now_s = time.monotonic() if now_s is None else now_s
        self._follow_rules()
        self._told = 0
        former, self._counted = self._counted, self._count()
        for rule in self._guarded:
            counted = self._counted[rule.rule_id]
            # Under another limit something may have been dropped before: with a new one counting begins at this look.
            dropped = max(counted - former.get(rule.rule_id, counted), 0)
            if dropped or rule.rule_id in self._over:
                self._judge(rule, dropped, now_s)
        if self._told > TOLD_MAX:
            self._log.warning(f"{self._told - TOLD_MAX} more rules went over their limits, or back under them")

    def _follow_rules(self) -> None:
        if self._generation == self._fleet.generation:
            return
        self._generation = self._fleet.generation
        former = {rule.rule_id: limits_of(rule) for rule in self._guarded}
        self._guarded = [planned.rule for planned in self._fleet.plan.rules if limits_of(planned.rule)]
        self._slots = np.array([self._fleet.rule_slots[rule.rule_id] for rule in self._guarded], np.int64)
        same = {rule.rule_id for rule in self._guarded if former.get(rule.rule_id) == limits_of(rule)}
        self._over = {rule_id: excess for rule_id, excess in self._over.items() if rule_id in same}
        self._counted = {rule_id: counted for rule_id, counted in self._counted.items() if rule_id in same}

    def _count(self) -> dict[str, int]:
        """What every guarded rule has dropped; a worker may have written anything."""
        total = np.zeros(len(self._slots), np.int64)
        for worker in self._fleet.workers if len(self._slots) else ():
            total += np.clip(worker.stats.rules["drops_rate_limit"][self._slots], 0, 1 << 48)
        return dict(zip((rule.rule_id for rule in self._guarded), total.tolist(), strict=True))

    def _judge(self, rule: Rule, dropped: int, now_s: float) -> None:
        """Compare with what is known of a rule, tell what is new, and remember."""
        excess = self._over.get(rule.rule_id)
        if excess is None:
            self._over[rule.rule_id] = Excess(dropped, now_s)
            keys = " or ".join(key for key in ("max_pps", "max_bps") if getattr(rule, key))
            line = f"Rule {rule.rule_id} is over its limit of {limits_of(rule)}: {dropped} datagrams dropped"
            self._tell(f"{line}; see mcrctl streams, or raise {keys}", rule, is_over=False)
        elif dropped:
            excess.dropped += dropped
            excess.last_s = now_s
        elif now_s - excess.last_s >= QUIET_S:
            del self._over[rule.rule_id]
            line = f"Rule {rule.rule_id} is back under its limit: {excess.dropped} datagrams were dropped"
            self._tell(line, rule, is_over=True)

    def _tell(self, line: str, rule: Rule, is_over: bool) -> None:
        self._told += 1
        if self._told <= TOLD_MAX:
            (self._log.notice if is_over else self._log.warning)(line, rule=rule.rule_id)
