"""Who is ill, decided from signs of life, from what the kernel says, and from deaths."""

from collections.abc import Callable, Sequence

from hypothesis import given
from hypothesis import strategies as st

from relay.supervisor.health import (
    HANG_S,
    HANG_YOUNG_S,
    HOPELESS_DEATHS,
    PULSE_INTERVAL_S,
    RESTART_S_MAX,
    START_HANG_S,
    YOUNG_S,
    Lives,
    Pulse,
    Vitals,
)

STOPPED = Vitals(is_runnable=False, is_traced=False, cpu_s=1.0)
TRACED = Vitals(is_runnable=False, is_traced=True, cpu_s=1.0)


def says(vitals: Vitals | None) -> Callable[[], Vitals | None]:
    """A kernel that says this."""
    return lambda: vitals


def looks(pulse: Pulse, signs: Sequence[int], seen: Sequence[Vitals | None], limit_s: float = HANG_S) -> list[bool]:
    """What each of these looks finds, one an interval."""
    return [
        pulse.hangs(sign, (i + 1) * PULSE_INTERVAL_S, says(vitals), limit_s)
        for i, (sign, vitals) in enumerate(zip(signs, seen, strict=True))
    ]


def runs(share: float, count: int) -> list[Vitals]:
    """A process that never sleeps and gets a share of its core."""
    return [Vitals(is_runnable=True, is_traced=False, cpu_s=i * share * PULSE_INTERVAL_S) for i in range(count)]


def begun() -> Pulse:
    pulse = Pulse()
    pulse.begin(0.0)
    return pulse


def test_a_stopped_process_is_found_within_a_second_and_not_before_its_time() -> None:
    found_s = looks(begun(), [7] * 20, [STOPPED] * 20).index(True) * PULSE_INTERVAL_S
    assert HANG_S - PULSE_INTERVAL_S <= found_s < 0.9


def test_an_endless_loop_is_found_within_a_second() -> None:
    found = looks(begun(), [7] * 20, runs(1.0, 20))
    assert (found.index(True) + 1) * PULSE_INTERVAL_S < 0.95


def test_a_process_that_the_kernel_tells_nothing_of_is_judged_by_the_clock() -> None:
    assert True in looks(begun(), [7] * 10, [None] * 10)


def test_one_that_starts_has_longer() -> None:
    found = looks(begun(), [7] * 40, [STOPPED] * 40, START_HANG_S)
    assert found.index(True) * PULSE_INTERVAL_S >= START_HANG_S - PULSE_INTERVAL_S


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=50))
def test_any_change_is_a_sign_of_life(signs: list[int]) -> None:
    changing = [value for pair in zip(signs, [~sign for sign in signs], strict=True) for value in pair]
    assert not any(looks(begun(), changing, [STOPPED] * len(changing)))


def test_a_process_that_gets_no_core_is_not_taken_for_a_hanging_one() -> None:
    assert not any(looks(begun(), [7] * 50, runs(0.0, 50)))
    assert not any(looks(begun(), [7] * 50, runs(0.05, 50)))


def test_a_process_under_a_debugger_is_not_taken_for_a_hanging_one() -> None:
    assert not any(looks(begun(), [7] * 100, [TRACED] * 100))


@given(st.lists(st.floats(0, 1e6, allow_nan=False), min_size=1, max_size=3))
def test_what_nobody_watched_is_no_silence(pauses_s: list[float]) -> None:
    """The machine slept, or the supervisor was kept from its core: two such looks prove nothing."""
    pulse = begun()
    now_s = 0.1
    assert not pulse.hangs(1, now_s, says(STOPPED))
    for pause_s in pauses_s[:2]:
        now_s += pause_s
        assert not pulse.hangs(1, now_s, says(STOPPED))


@given(
    st.lists(
        st.tuples(
            st.integers(-(2**63), 2**63 - 1),
            st.floats(-1e9, 1e9),
            st.none() | st.builds(Vitals, st.booleans(), st.booleans(), st.floats(-1e9, 1e9)),
        ),
        max_size=50,
    )
)
def test_silence_is_never_longer_than_what_was_watched(history: list[tuple[int, float, Vitals | None]]) -> None:
    pulse, silent_looks, before = begun(), 0, None
    for sign, now_s, vitals in history:
        found = pulse.hangs(sign, now_s, says(vitals))
        silent_looks = silent_looks + 1 if sign == before else 0
        before = sign
        assert not found or silent_looks * 2 * PULSE_INTERVAL_S >= HANG_S


@given(st.lists(st.tuples(st.floats(0, 1000), st.booleans()), max_size=30))
def test_the_next_start_is_delayed_by_young_deaths_only(deaths: list[tuple[float, bool]]) -> None:
    lives, young = Lives(), 0
    for lived_s, hung in deaths:
        delay_s = lives.died(lived_s, hung)
        young = young + 1 if lived_s < (HANG_YOUNG_S if hung else YOUNG_S) else 0
        assert lives.is_hopeless == (young >= HOPELESS_DEATHS)
        assert (delay_s > 0) == (young > 1)
        assert delay_s <= RESTART_S_MAX


def test_the_delay_grows_to_its_limit() -> None:
    lives = Lives()
    delays_s = [lives.died(0.0) for _ in range(40)]
    assert delays_s == sorted(delays_s)
    assert delays_s[-1] == RESTART_S_MAX


def test_who_recovered_begins_anew() -> None:
    lives = Lives()
    for _ in range(HOPELESS_DEATHS):
        lives.died(0.0)
    assert lives.is_hopeless
    lives.recovered()
    assert not lives.is_hopeless
    assert lives.died(0.0) == 0.0
