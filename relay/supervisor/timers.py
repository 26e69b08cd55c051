"""Timers of the supervisor's loop: actions at a time, run between two waits."""

import time
from collections.abc import Callable


class Timers:
    """Actions that wait for their time (CLOCK_MONOTONIC)."""

    def __init__(self) -> None:
        self._waiting: list[tuple[float, Callable[[], None]]] = []

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Run `action` once, `delay_s` from now."""
        self._waiting.append((time.monotonic() + delay_s, action))

    def next_s(self) -> float:
        """When the next action is due; infinity when none waits."""
        return min((at_s for at_s, _ in self._waiting), default=float("inf"))

    def run_due(self) -> None:
        """Run every action whose time has come."""
        now_s = time.monotonic()
        for timer in [timer for timer in self._waiting if timer[0] <= now_s]:
            self._waiting.remove(timer)
            timer[1]()
