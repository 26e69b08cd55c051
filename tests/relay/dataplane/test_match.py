"""The compiled match against an obvious Python one."""

from hypothesis import given, settings
from hypothesis import strategies as st

from relay.dataplane.match import NO_ENTRY, is_own_source, match
from relay.dataplane.table import OwnSource, TableOutput, TableRule, compile_table, view_table
from tests.relay.dataplane.bare import addressed

GROUPS = st.sampled_from(["239.1.1.1", "239.1.1.2", "10.0.0.1", "ff3e::8000:1", "ff3e::1:8000:1", "2001:db8::1"])
PORTS = st.sampled_from([5000, 5001])
SOURCES = st.sampled_from([None, "10.0.0.7", "10.0.0.8", "2001:db8::7", "2001:db8:0:1::7"])
RINGS = st.sampled_from([(0,), (1,), (0, 1)])


@st.composite
def rule_sets(draw: st.DrawFn) -> list[TableRule]:
    inputs = draw(st.lists(st.tuples(GROUPS, PORTS, SOURCES, RINGS), max_size=12))
    return [
        TableRule(
            slot=slot,
            name=f"rule{slot}",
            group=group,
            port=port,
            source=source,
            rings=rings,
            preserve_source=False,
            outputs=(TableOutput(slot, "239.2.2.2", 6000, slot, 1472, True, False),),
        )
        for slot, (group, port, source, rings) in enumerate(inputs)
    ]


@given(rules=rule_sets(), group=GROUPS, port=PORTS, ring=st.integers(0, 1), source=SOURCES)
@settings(max_examples=300, deadline=None)
def test_match_finds_exactly_the_rules_that_apply(
    rules: list[TableRule], group: str, port: int, ring: int, source: str | None
) -> None:
    source = source or "11.0.0.1"
    table = view_table(compile_table(rules, (), 1))
    expected = {
        rule.slot
        for rule in rules
        if rule.group == group and rule.port == port and ring in rule.rings and rule.source in (None, source)
    }
    entry = match(table.view, addressed(source, group), port, ring)
    found = set()
    if entry != NO_ENTRY:
        first, count = table["entries"][entry]["first_route"], table["entries"][entry]["routes"]
        found = {int(route["rule"]) for route in table["routes"][first : first + count]}
    assert found == expected


def test_own_egress_socket_is_recognised_and_a_neighbour_is_not() -> None:
    own = [OwnSource("10.0.0.1", 40000, "239.9.9.9", 9), OwnSource(None, 40001, "239.1.1.1", 5000)]
    table = view_table(compile_table((), own, 1))
    assert is_own_source(table.view, addressed("10.0.0.1", "239.3.3.3", 40000, 1))
    assert not is_own_source(table.view, addressed("10.0.0.2", "239.3.3.3", 40000, 1))
    assert is_own_source(table.view, addressed("12.0.0.1", "239.1.1.1", 40001, 5000))
    assert not is_own_source(table.view, addressed("12.0.0.1", "239.1.1.1", 40001, 5001))
