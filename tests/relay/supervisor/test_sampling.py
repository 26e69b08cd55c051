"""Counters of several workers as one, and their times on the wall clock."""

import time

import numpy as np
import pytest

from relay.dataplane.layout import RULE_STATS
from relay.supervisor.sampling import _sum_fields, unix_s


def test_counts_are_added_and_of_times_the_last_one_counts() -> None:
    first, second = np.zeros(2, RULE_STATS), np.zeros(2, RULE_STATS)
    first["packets"], second["packets"] = (1, 2), (10, 20)
    first["last_ns"], second["last_ns"] = (7, 0), (3, 9)
    total = _sum_fields([first, second])
    assert total["packets"].tolist() == [11, 22]
    assert total["last_ns"].tolist() == [7, 9]
    assert first["packets"].tolist() == [1, 2]


def test_a_time_is_told_by_the_wall_clock() -> None:
    earlier_s = time.time()
    told = unix_s(time.monotonic_ns() - 5_000_000_000)
    assert told is not None
    assert earlier_s - 5.01 <= told <= time.time() - 4.99


@pytest.mark.parametrize("number", [0, -1, -(1 << 63), (1 << 63) - 1])
def test_never_and_nonsense_are_no_time(number: int) -> None:
    assert unix_s(np.int64(number)) is None
