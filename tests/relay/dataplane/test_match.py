"""The compiled match against an obvious Python one."""

from hypothesis import given, settings
from hypothesis import strategies as st

from relay.dataplane.match import NO_ENTRY, is_own_source, match
from relay.dataplane.table import OwnSource, TableOutput, TableRule, compile_table, view_table

GROUPS = st.sampled_from([0xEF010101, 0xEF010102, 0x0A000001])
PORTS = st.sampled_from([5000, 5001])
SOURCES = st.sampled_from([0, 0x0A000007, 0x0A000008])
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
            outputs=(TableOutput(slot, 0xEF020202, 6000, slot, 1472, True, False),),
        )
        for slot, (group, port, source, rings) in enumerate(inputs)
    ]


@given(rules=rule_sets(), group=GROUPS, port=PORTS, ring=st.integers(0, 1), source=SOURCES)
@settings(max_examples=300, deadline=None)
def test_match_finds_exactly_the_rules_that_apply(
    rules: list[TableRule], group: int, port: int, ring: int, source: int
) -> None:
    source = source or 0x0B000001
    table = view_table(compile_table(rules, (), 1))
    expected = {
        rule.slot
        for rule in rules
        if rule.group == group and rule.port == port and ring in rule.rings and rule.source in (0, source)
    }
    entry = match(table.view, group, port, ring, source)
    found = set()
    if entry != NO_ENTRY:
        first, count = table["entries"][entry]["first_route"], table["entries"][entry]["routes"]
        found = {int(route["rule"]) for route in table["routes"][first : first + count]}
    assert found == expected


def test_own_egress_socket_is_recognised_and_a_neighbour_is_not() -> None:
    own = [OwnSource(0x0A000001, 40000, 0, 0), OwnSource(0, 40001, 0xEF010101, 5000)]
    table = view_table(compile_table((), own, 1))
    assert is_own_source(table.view, 0x0A000001, 40000, 0xEF030303, 1)
    assert not is_own_source(table.view, 0x0A000002, 40000, 0xEF030303, 1)
    assert is_own_source(table.view, 0x0C000001, 40001, 0xEF010101, 5000)
    assert not is_own_source(table.view, 0x0C000001, 40001, 0xEF010101, 5001)
