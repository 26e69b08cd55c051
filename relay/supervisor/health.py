"""Who is ill: a worker that shows no sign of life, or that dies young again and again. Pure.

Signs of life come from a less privileged process: only whether they change counts, never their value.
"""

from collections.abc import Hashable

PULSE_INTERVAL_S = 0.1  # a worker's own, and how often the supervisor looks
HANG_S = 0.7  # without a sign of life: killed and replaced, all within a second
YOUNG_S = 0.25  # a worker that dies sooner after its start has done nothing but fail
RESTART_S_FIRST = 0.1
RESTART_S_MAX = 10.0
HOPELESS_DEATHS = 5  # young, one after the other
PROBATION_S = 2.0  # alive without traffic, until it gets its share again


class Pulse:
    """Signs of life of one process."""

    def __init__(self) -> None:
        self._sign: Hashable = None
        self._looked_s = 0.0
        self._silent_s = 0.0

    def begin(self, now_s: float) -> None:
        """A process was started: nothing is known of it."""
        self._sign, self._looked_s, self._silent_s = None, now_s, 0.0

    def hangs(self, sign: Hashable, now_s: float) -> bool:
        """Look once. Only watched time counts as silence: a supervisor that was kept from its core saw nothing."""
        elapsed_s, self._looked_s = now_s - self._looked_s, now_s
        if sign != self._sign:
            self._sign, self._silent_s = sign, 0.0
            return False
        self._silent_s += min(max(elapsed_s, 0.0), 2 * PULSE_INTERVAL_S)
        return self._silent_s >= HANG_S


class Lives:
    """How a worker's processes have died."""

    def __init__(self) -> None:
        self.young_deaths = 0

    def died(self, lived_s: float) -> float:
        """Count a death; return the seconds until the next start: none, unless it keeps dying."""
        if lived_s >= YOUNG_S:
            self.young_deaths = 0
            return 0.0
        self.young_deaths += 1
        if self.young_deaths == 1:
            return 0.0
        return float(min(RESTART_S_FIRST * 2.0 ** min(self.young_deaths - 2, 30), RESTART_S_MAX))

    @property
    def is_hopeless(self) -> bool:
        """Whether its traffic is better given to others."""
        return self.young_deaths >= HOPELESS_DEATHS
