"""The rule table: what is compiled is what the workers find, compared with a search through a plain list."""

import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.dataplane.match import NO_ENTRY, is_own_source, match
from relay.dataplane.table import OwnSource, TableOutput, TableRule, compile_table, map_table, publish, view_table
from tests.relay.dataplane.bare import addressed

GROUPS = st.sampled_from(["239.0.0.1", "239.0.0.2", "239.0.0.3", "ff3e::1", "ff3e::2", "ff3e:0:0:1::1", "fd00::efff:1"])
SENDERS = st.sampled_from(["10.0.0.1", "10.0.0.2", "2001:db8::1", "2001:db8:0:1::1"])
SOURCES = st.none() | SENDERS
OWN = st.tuples(st.sampled_from(["10.0.0.1", "10.0.0.2", "fe80::1", "fe80::2"]), st.integers(1, 5))


def output(slot: int) -> TableOutput:
    return TableOutput(slot, f"10.0.0.{slot + 1}", 6001, slot, 1472, True, False)


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


@given(rule_lists(), GROUPS, st.integers(1, 3), st.integers(0, 2), SENDERS)
def test_a_datagram_finds_exactly_the_rules_that_want_it(
    rules: list[TableRule], group: str, port: int, ring: int, source: str
) -> None:
    wanted = {
        rule.slot: [output.slot for output in rule.outputs]
        for rule in rules
        if (rule.group, rule.port) == (group, port) and ring in rule.rings and rule.source in (None, source)
    }
    table = view_table(compile_table(rules, (), 7))
    entry = match(table.view, addressed(source, group), port, ring)
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


@given(st.lists(OWN, max_size=20), OWN)
def test_own_sources_are_known_by_address_and_port(own: list[tuple[str, int]], sender: tuple[str, int]) -> None:
    table = view_table(compile_table((), [OwnSource(a, p, "10.0.0.9", 9) for a, p in own], 1))
    assert is_own_source(table.view, addressed(sender[0], "239.1.1.1", sender[1], 1)) == (sender in own)


def test_a_socket_that_preserves_sources_is_known_by_where_it_sends() -> None:
    own = [OwnSource(None, 4000, "10.0.0.77", 6001), OwnSource(None, 4002, "ff3e::77", 6001)]
    table = view_table(compile_table((), own, 1))
    assert is_own_source(table.view, addressed("10.1.2.3", "10.0.0.77", 4000, 6001))
    assert not is_own_source(table.view, addressed("10.1.2.3", "10.0.0.78", 4000, 6001))
    assert not is_own_source(table.view, addressed("10.1.2.3", "10.0.0.77", 4001, 6001))
    assert is_own_source(table.view, addressed("2001:db8::3", "ff3e::77", 4002, 6001))
    assert not is_own_source(table.view, addressed("2001:db8::3", "ff3e:0:0:1::77", 4002, 6001))


@pytest.mark.parametrize(
    ("address", "scope"),
    [("fe80::1", 7), ("febf::1", 7), ("ff02::1", 7), ("ff12::1", 7), ("ff11::1", 7), ("ff05::1", 0), ("fec0::1", 0)],
)
def test_where_an_output_sends_is_told_as_the_kernel_wants_it(address: str, scope: int) -> None:
    rule = TableRule(
        0, "r", "239.0.0.1", 1, None, (0,), False, (TableOutput(0, address, 6001, 0, 0, False, False, ifindex=7),)
    )
    name = view_table(compile_table([rule], (), 1))["outputs"][0]
    raw = name["name"].tobytes()[: name["name_bytes"]]
    family, port, flow, number, scope_id = struct.unpack("=HHI16sI", raw)
    assert (family, socket.ntohs(port), flow, scope_id) == (socket.AF_INET6, 6001, 0, scope)
    assert socket.inet_ntop(socket.AF_INET6, number) == address


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
