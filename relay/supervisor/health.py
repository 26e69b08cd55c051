"""Who is ill: a worker that shows no sign of life, or that dies young again and again. Pure.

Signs of life come from a less privileged process: only whether they change counts, never their value. Silence is
measured in time that the process could have used: the supervisor watched it, and the kernel let it run.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

PULSE_INTERVAL_S = 0.1  # a worker's own, and how often the supervisor looks
HANG_S = 0.5  # without a sign of life: killed and replaced, all within a second
START_HANG_S = 2.0  # the same until a forked worker says that it runs, which takes 20 ms
YOUNG_S = 0.25  # a worker that dies sooner after its start has done nothing but fail
HANG_YOUNG_S = 10.0  # the same of one that is killed because it hangs, which takes its time
RESTART_S_FIRST = 0.1
RESTART_S_MAX = 10.0
HOPELESS_DEATHS = 5  # young, one after the other
PROBATION_S = 2.0  # alive without traffic, until it gets its share again


@dataclass(frozen=True)
class Vitals:
    """What the kernel says of a process."""

    is_runnable: bool  # on a core, or waiting for one
    is_traced: bool  # stopped by a debugger
    cpu_s: float  # used since its start


class Pulse:
    """Signs of life of one process."""

    def __init__(self) -> None:
        self.begin(0.0)

    def begin(self, now_s: float) -> None:
        """A process was started: nothing is known of it."""
        self._sign: Hashable = None
        self._looked_s = now_s
        self._silent_s = 0.0
        self._cpu_s: float | None = None

    def hangs(
        self, sign: Hashable, now_s: float, read_vitals: Callable[[], Vitals | None], limit_s: float = HANG_S
    ) -> bool:
        """Look once, at the kernel's word only when `sign` is the same as at the last look.

        A supervisor that was kept from its core saw nothing meanwhile, so a look counts for two intervals at most.
        """
        elapsed_s, self._looked_s = min(max(now_s - self._looked_s, 0.0), 2 * PULSE_INTERVAL_S), now_s
        if sign != self._sign:
            self._sign, self._silent_s, self._cpu_s = sign, 0.0, None
            return False
        self._silent_s += self._usable_s(read_vitals(), elapsed_s)
        return self._silent_s >= limit_s

    def _usable_s(self, vitals: Vitals | None, elapsed_s: float) -> float:
        """How much of the time between two looks the process could have shown a sign of life in."""
        if vitals is None:
            return elapsed_s
        before_s, self._cpu_s = self._cpu_s, vitals.cpu_s
        if vitals.is_traced:
            return 0.0
        if not vitals.is_runnable:
            return elapsed_s
        return min(max(vitals.cpu_s - before_s, 0.0), elapsed_s) if before_s is not None else 0.0


class Lives:
    """How a worker's processes have died."""

    def __init__(self) -> None:
        self.young_deaths = 0

    def died(self, lived_s: float, hung: bool = False) -> float:
        """Count a death; return the seconds until the next start: none, unless it keeps dying."""
        if lived_s >= (HANG_YOUNG_S if hung else YOUNG_S):
            self.young_deaths = 0
            return 0.0
        self.young_deaths += 1
        if self.young_deaths == 1:
            return 0.0
        return float(min(RESTART_S_FIRST * 2.0 ** min(self.young_deaths - 2, 30), RESTART_S_MAX))

    def recovered(self) -> None:
        """It has stayed alive."""
        self.young_deaths = 0

    @property
    def is_hopeless(self) -> bool:
        """Whether its traffic is better given to others."""
        return self.young_deaths >= HOPELESS_DEATHS
