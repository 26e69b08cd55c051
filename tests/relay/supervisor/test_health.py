"""Who is ill, decided from signs of life and deaths."""

from hypothesis import given
from hypothesis import strategies as st

from relay.supervisor.health import HANG_S, HOPELESS_DEATHS, PULSE_INTERVAL_S, RESTART_S_MAX, YOUNG_S, Lives, Pulse


def looks(pulse: Pulse, signs: list[int], start_s: float = 0.0, interval_s: float = PULSE_INTERVAL_S) -> list[bool]:
    return [pulse.hangs(sign, start_s + (i + 1) * interval_s) for i, sign in enumerate(signs)]


def test_silence_is_found_within_a_second() -> None:
    pulse = Pulse()
    pulse.begin(0.0)
    found = looks(pulse, [7] * 10)
    assert found.index(True) * PULSE_INTERVAL_S < 1.0
    assert found.index(True) * PULSE_INTERVAL_S >= HANG_S - PULSE_INTERVAL_S


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=50))
def test_any_change_is_a_sign_of_life(signs: list[int]) -> None:
    pulse = Pulse()
    pulse.begin(0.0)
    changing = [value for pair in zip(signs, [~sign for sign in signs], strict=True) for value in pair]
    assert not any(looks(pulse, changing))


def test_what_nobody_watched_is_no_silence() -> None:
    pulse = Pulse()
    pulse.begin(0.0)
    pulse.hangs(1, 0.1)
    assert not pulse.hangs(1, 3600.0)  # the machine slept, or the supervisor was kept from its core
    assert not pulse.hangs(1, 7200.0)


@given(st.lists(st.floats(0, 1000), max_size=30))
def test_the_next_start_is_delayed_by_young_deaths_only(lives_s: list[float]) -> None:
    lives, young = Lives(), 0
    for lived_s in lives_s:
        delay_s = lives.died(lived_s)
        young = young + 1 if lived_s < YOUNG_S else 0
        assert lives.is_hopeless == (young >= HOPELESS_DEATHS)
        assert (delay_s > 0) == (young > 1)
        assert delay_s <= RESTART_S_MAX


def test_the_delay_grows_to_its_limit() -> None:
    lives = Lives()
    delays_s = [lives.died(0.0) for _ in range(40)]
    assert delays_s == sorted(delays_s)
    assert delays_s[-1] == RESTART_S_MAX
