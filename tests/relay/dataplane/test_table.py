"""The rule table: what is compiled is what the workers find, compared with a search through a plain list."""

from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.dataplane.match import NO_ENTRY, is_own_source, match
from relay.dataplane.table import OwnSource, TableOutput, TableRule, compile_table, map_table, publish, view_table

GROUPS = st.integers(int(IPv4Address("239.0.0.1")), int(IPv4Address("239.0.0.6")))
SOURCES = st.sampled_from([0, 1, 2])


def output(slot: int) -> TableOutput:
    return TableOutput(slot, slot + 1, 6001, slot, 1472, True, False)


@st.composite
def rule_lists(draw: st.DrawFn) -> list[TableRule]:
    count = draw(st.integers(0, 12))
    return [
        TableRule(
            slot=slot,
            name=f"r{slot}",
            group=draw(GROUPS),
            port=draw(st.integers(1, 3)),
            source=draw(SOURCES),
            rings=tuple(sorted(draw(st.sets(st.integers(0, 2), min_size=1)))),
            preserve_source=False,
            outputs=tuple(output(slot * 4 + i) for i in range(draw(st.integers(0, 3)))),
        )
        for slot in range(count)
    ]


@given(rule_lists(), GROUPS, st.integers(1, 3), st.integers(0, 2), st.integers(1, 3))
def test_a_datagram_finds_exactly_the_rules_that_want_it(
    rules: list[TableRule], group: int, port: int, ring: int, source: int
) -> None:
    wanted = {
        rule.slot: [output.slot for output in rule.outputs]
        for rule in rules
        if (rule.group, rule.port) == (group, port) and ring in rule.rings and rule.source in (0, source)
    }
    table = view_table(compile_table(rules, (), 7))
    entry = match(table.view, group, port, ring, source)
    found = {}
    if entry != NO_ENTRY:
        first, count = int(table["entries"][entry]["first_route"]), int(table["entries"][entry]["routes"])
        for route in table["routes"][first : first + count]:
            at = int(route["first_output"])
            found[int(route["rule"])] = [
                int(slot) for slot in table["route_outputs"]["output"][at : at + int(route["outputs"])]
            ]
    assert table.generation == 7
    assert found == wanted


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), max_size=20), st.integers(1, 5), st.integers(1, 5))
def test_own_sources_are_known_by_address_and_port(own: list[tuple[int, int]], address: int, port: int) -> None:
    table = view_table(compile_table((), [OwnSource(a, p, 9, 9) for a, p in own], 1))
    assert is_own_source(table.view, address, port, 1, 1) == ((address, port) in own)


def test_a_socket_that_preserves_sources_is_known_by_where_it_sends() -> None:
    table = view_table(compile_table((), [OwnSource(0, 4000, 77, 6001)], 1))
    assert is_own_source(table.view, 123, 4000, 77, 6001)
    assert not is_own_source(table.view, 123, 4000, 78, 6001)
    assert not is_own_source(table.view, 123, 4001, 77, 6001)


def test_a_published_table_cannot_be_changed_by_whoever_maps_it() -> None:
    fd = publish(compile_table((), (), 3))
    table = map_table(fd)
    assert table.generation == 3
    assert not table["keys"].flags.writeable
    with open(f"/proc/self/fd/{fd}", "r+b", buffering=0) as file, pytest.raises(PermissionError):  # noqa: PTH123
        file.write(b"x")


def test_bytes_that_are_no_table_are_refused() -> None:
    with pytest.raises(ValueError, match="not a rule table"):
        view_table(bytes(4096))
