"""Changes of rules or interfaces: one at a time, each begun, confirmed by every worker, and ended.

Owned by the supervisor's thread. What asks for a change is told its end or its refusal by a callback.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from relay.errors import RelayError
from relay.supervisor.fleet import Fleet

WAITING_MAX = 16  # a control plane sends one and waits for its end
CONFIRM_S_MAX = 5.0  # a worker that does not go over to a new table in this time is reported


@dataclass
class Change:
    """`begin` starts it and returns warnings; then either `end`, with all warnings, or `refuse`, with the reason."""

    begin: Callable[[], list[str]]
    end: Callable[[list[str]], None]
    refuse: Callable[[str], None]
    warnings: list[str] = field(default_factory=list)
    deadline_s: float = 0.0


class Changes:
    """The change under way and those that wait for it."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._waiting: deque[Change] = deque()
        self._current: Change | None = None

    def add(self, change: Change) -> None:
        """Queue a change; `settle` begins it."""
        self._waiting.append(change)

    @property
    def is_full(self) -> bool:
        """Whether whoever asks for more should be refused."""
        return len(self._waiting) >= WAITING_MAX

    def deadline_s(self) -> float:
        """When the change under way is late; infinity when there is none."""
        return self._current.deadline_s if self._current is not None else float("inf")

    def settle(self) -> None:
        """End the change under way if every worker has gone over, and begin those that wait."""
        while self._end_current() and self._waiting:
            change = self._waiting.popleft()
            try:
                change.warnings = change.begin()
            except RelayError as error:
                change.refuse(str(error))
                continue
            change.deadline_s = time.monotonic() + CONFIRM_S_MAX
            self._current = change

    def _end_current(self) -> bool:
        """Whether no change is under way any more."""
        if self._current is None:
            return True
        if not self._fleet.is_confirmed():
            if time.monotonic() < self._current.deadline_s:
                return False
            cores = [w.core for w in self._fleet.workers if w.generation != self._fleet.generation]
            self._current.warnings.append(f"workers on cores {cores} have not taken the change yet")
        ended, self._current = self._current, None
        ended.end(ended.warnings + self._fleet.finish())
        return True
