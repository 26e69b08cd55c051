"""Levels: which severities are written, by facility and core, for the rings that are there and those that come later.

Owned by whoever makes or drains the rings. A level takes effect with the writer's next record: it lies in the ring's
header, where every writer looks first.
"""

from collections.abc import Iterable
from typing import NamedTuple

from logging_shm.facility import Facility, Severity
from logging_shm.ring import SharedSPSCRingBuffer


class Choice(NamedTuple):
    """What was said of a level: None stands for all."""

    facility: Facility | None
    core: int | None
    level: Severity

    def covers(self, facility: Facility | None, core: int | None) -> bool:
        """Whether it speaks of all that `facility` and `core` do."""
        return self.facility in (None, facility) and self.core in (None, core)


class LevelPolicy:
    """Choices of levels; the last one that speaks of a ring holds."""

    def __init__(self, level: Severity = Severity.Debug) -> None:
        self._choices = [Choice(None, None, level)]

    def set(self, level: Severity, facility: Facility | None = None, core: int | None = None) -> None:
        """Choose a level for a facility, a core, a facility of a core, or everything."""
        choice = Choice(facility, core, level)
        self._choices = [former for former in self._choices if not choice.covers(former.facility, former.core)]
        self._choices.append(choice)

    def of(self, facility: Facility, core: int) -> Severity:
        """The level of a ring."""
        return next(choice.level for choice in reversed(self._choices) if choice.covers(facility, core))

    def apply(self, rings: Iterable[SharedSPSCRingBuffer]) -> None:
        """Put the levels of rings into their headers."""
        for ring in rings:
            ring.segment.level = self.of(ring.facility, ring.core)
