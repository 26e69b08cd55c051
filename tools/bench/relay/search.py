"""The highest rate without loss, by bisection. Pure but for the trials that it asks for."""

from collections.abc import Callable
from typing import NamedTuple

STEPS_BACK_MAX = 4
BACK = 0.93  # what held for a short trial and not for the long one is tried again so much slower


class Point(NamedTuple):
    """What came of a trial: the rate that was achieved, and the part that was lost."""

    pps: float
    loss: float


class Found(NamedTuple):
    """The highest rate without loss."""

    pps: float
    is_generators: bool  # the generator's own limit: nothing was lost flat out


Attempt = Callable[[float, float], Point]  # of rate (0: flat out) and seconds


def highest_lossless(attempt: Attempt, steps: int, step_s: float, confirm_s: float) -> Found:
    """Try flat out, then bisect `steps` times below it, and confirm the best for longer."""
    flat_out = attempt(0.0, step_s)
    if flat_out.loss == 0.0:
        confirmed = attempt(0.0, confirm_s)
        if confirmed.loss == 0.0:
            return Found(confirmed.pps, True)
    low, high = 0.0, flat_out.pps
    for _ in range(steps):
        middle = (low + high) / 2
        point = attempt(middle, step_s)
        if point.loss == 0.0:
            low = max(low, min(point.pps, middle))
        else:
            high = middle
    return Found(_confirm(attempt, low, confirm_s), False)


def _confirm(attempt: Attempt, pps: float, confirm_s: float) -> float:
    for _ in range(STEPS_BACK_MAX):
        if pps <= 0.0:
            break
        point = attempt(pps, confirm_s)
        if point.loss == 0.0:
            return min(point.pps, pps)
        pps *= BACK
    return 0.0
