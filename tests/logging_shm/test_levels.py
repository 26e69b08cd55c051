"""Level policies: the last choice that speaks of a ring holds, also for rings that come later."""

from hypothesis import given
from hypothesis import strategies as st

from logging_shm import Facility, LevelPolicy, Severity
from tests.logging_shm.conftest import MakeRing

CHOICES = st.tuples(
    st.sampled_from(Severity),
    st.none() | st.sampled_from([Facility.Ingress, Facility.Egress]),
    st.none() | st.integers(0, 1),
)


@given(st.lists(CHOICES, max_size=12))
def test_the_last_choice_that_speaks_of_a_ring_holds(
    choices: list[tuple[Severity, Facility | None, int | None]],
) -> None:
    policy = LevelPolicy(Severity.Info)
    for choice in choices:
        policy.set(*choice)
    for facility in (Facility.Ingress, Facility.Egress):
        for core in (0, 1):
            speaking = [level for level, f, c in choices if f in (None, facility) and c in (None, core)]
            assert policy.of(facility, core) is (speaking[-1] if speaking else Severity.Info)


def test_a_policy_is_applied_to_rings_by_facility_and_core(make_ring: MakeRing) -> None:
    policy = LevelPolicy(Severity.Warning)
    policy.set(Severity.Debug, Facility.Test, core=1)
    rings = [make_ring(core=core) for core in (0, 1)]
    policy.apply(rings)
    assert [ring.segment.level for ring in rings] == [Severity.Warning, Severity.Debug]
