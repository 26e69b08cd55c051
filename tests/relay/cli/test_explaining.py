"""What explain says of rules is what the compiled matcher finds; what passes the filter is the kernel's word."""

import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay import bpf
from relay.cli.explaining.facts import Datagram, Facts
from relay.cli.explaining.rules import differences, matching, nearest
from relay.cli.explaining.way_in import admits, frame, likely_interface, own_egress
from relay.cli.host import IFF_LOOPBACK, IFF_UP, UdpSocket
from relay.dataplane.match import NO_ENTRY, is_own_source, match
from relay.dataplane.table import OwnSource, TableRule, compile_table, view_table
from relay.rules import Output, Rule
from relay.supervisor.interfaces import Interface
from relay.supervisor.plan import Plan, make_plan
from tests.relay.dataplane.bare import addressed

INTERFACES = {
    name: Interface(name, index, True, True, 1500, (f"10.{index}.0.1",))
    for index, name in enumerate(("a", "b", "lo"), 1)
}
GROUPS = st.sampled_from(["239.1.1.1", "10.1.0.1"])
PORTS = st.sampled_from([5000, 5001])
SOURCES = st.sampled_from(["10.0.0.7", "10.0.0.8"])
NAMES = st.sampled_from(["a", "b", "missing"])


@st.composite
def rule_sets(draw: st.DrawFn) -> list[Rule]:
    inputs = draw(st.lists(st.tuples(GROUPS, PORTS, st.none() | SOURCES, st.none() | NAMES), min_size=2, max_size=12))
    return [
        Rule(
            rule_id=f"r{number}",
            input_group=group,
            input_port=port,
            source=source,
            input_interface=interface,
            outputs=(Output("239.9.9.9", 6000, "b"),),
        )
        for number, (group, port, source, interface) in enumerate(inputs)
    ]


def compiled_rules(plan: Plan) -> list[TableRule]:
    """The table's rules, as fleet.py makes them."""
    rings = {name: number for number, name in enumerate(plan.rings)}
    return [
        TableRule(
            slot=slot,
            name=planned.rule.rule_id,
            group=planned.rule.input_group,
            port=planned.rule.input_port,
            source=planned.rule.source,
            rings=tuple(rings[name] for name in planned.interfaces),
            preserve_source=False,
            outputs=(),
        )
        for slot, planned in enumerate(plan.rules)
    ]


@pytest.mark.parametrize(
    ("datagram", "differs"),
    [
        (Datagram("10.0.0.7", None, "239.1.1.1", 5000, "a"), []),
        (Datagram("10.0.0.7", None, "239.1.1.2", 5000, "a"), ["group: it takes 239.1.1.1"]),
        (Datagram("10.0.0.7", None, "239.1.1.1", 5001, "a"), ["port: it takes 5000"]),
        (Datagram("10.0.0.8", None, "239.1.1.1", 5000, "a"), ["source: it takes only 10.0.0.7"]),
        (Datagram("10.0.0.7", None, "239.1.1.1", 5000, "b"), ["interface: it takes from a"]),
    ],
)
def test_the_field_that_differs_is_named(datagram: Datagram, differs: list[str]) -> None:
    output = Output("239.9.9.9", 6000, "b")
    rule = Rule(rule_id="r", input_group="239.1.1.1", input_port=5000, source="10.0.0.7", outputs=(output,))
    (planned,) = make_plan([rule], INTERFACES, ("a",)).rules
    assert differences(planned, datagram) == differs


@given(rule_sets(), st.sampled_from([("a",), ("b",), ("a", "b")]), SOURCES, GROUPS, PORTS, st.sampled_from(["a", "b"]))
@settings(max_examples=200)
def test_the_rules_that_match_are_those_that_the_compiled_matcher_finds(
    rules: list[Rule], relayed_from: tuple[str, ...], source: str, group: str, port: int, interface: str
) -> None:
    plan = make_plan(rules, INTERFACES, relayed_from)
    found = {planned.rule.rule_id for planned in matching(plan.rules, Datagram(source, None, group, port, interface))}
    if interface not in plan.rings:
        assert not found
        return
    table = view_table(compile_table(compiled_rules(plan), (), 1))
    ring = list(plan.rings).index(interface)
    entry = match(table.view, addressed(source, group), port, ring)
    matched = set()
    if entry != NO_ENTRY:
        first, count = table["entries"][entry]["first_route"], table["entries"][entry]["routes"]
        matched = {plan.rules[int(route["rule"])].rule.rule_id for route in table["routes"][first : first + count]}
    assert found == matched


@given(rule_sets(), SOURCES, GROUPS, PORTS, st.sampled_from(["a", "b"]))
def test_no_rule_is_nearer_than_the_nearest(
    rules: list[Rule], source: str, group: str, port: int, interface: str
) -> None:
    plan = make_plan(rules, INTERFACES, ("a",))
    datagram = Datagram(source, None, group, port, interface)
    near = nearest(plan.rules, datagram)
    fewest = min((len(differences(planned, datagram)) for planned in plan.rules), default=9)
    assert near is None if fewest > 2 else near is not None and len(differences(near, datagram)) == fewest


@given(rule_sets(), GROUPS, PORTS, st.sampled_from(["a", "b"]))
def test_the_filter_admits_what_a_rule_takes_and_nothing_else(
    rules: list[Rule], group: str, port: int, interface: str
) -> None:
    plan = make_plan(rules, INTERFACES, ("a", "b"))
    wanted = any(
        (planned.rule.input_group, planned.rule.input_port) == (group, port) and interface in planned.interfaces
        for planned in plan.rules
    )
    program = bpf.assemble(plan.admitted[interface])
    assert admits(program, frame(Datagram("10.0.0.7", 4000, group, port, interface))) is wanted


def facts_of(rules: list[Rule], sockets: list[UdpSocket]) -> Facts:
    """A relay that takes in from lo, and whose sockets have the inodes up to 9."""
    return Facts(
        plan=make_plan(rules, INTERFACES, ("lo",)),
        interfaces=INTERFACES,
        flags={"lo": IFF_UP | IFF_LOOPBACK},
        has_carrier={},
        joined=None,
        source_filters={},
        sockets=sockets,
        own_inodes=frozenset(range(10)),
        memberships_max=20,
        ttl_default=64,
        rule_stats={},
        workers=(),
    )


def test_a_socket_of_another_program_is_not_the_relays() -> None:
    rules = [Rule(rule_id="r", input_group="239.7.7.7", input_port=1, outputs=(Output("239.1.1.1", 5000, "lo"),))]
    datagram = Datagram("10.3.0.1", 40_000, "239.1.1.1", 5000, "lo")
    for inode, verdict in ((9, "stop"), (10, "note")):
        sockets = [UdpSocket(("10.3.0.1", 40_000), ("239.1.1.1", 5000), inode)]
        assert own_egress(facts_of(rules, sockets), datagram).verdict == verdict


EGRESS = st.tuples(st.sampled_from(["239.1.1.1", "239.1.1.2"]), PORTS, st.booleans())


@given(
    st.lists(EGRESS, max_size=4, unique_by=lambda egress: egress[:2]).filter(
        lambda outputs: sum(preserve for _, _, preserve in outputs) < 2  # those are not told apart
    ),
    st.sampled_from(["10.3.0.1", "10.0.0.7"]),
    st.integers(40_000, 40_004),
    st.sampled_from(["239.1.1.1", "239.1.1.2"]),
    PORTS,
)
@settings(max_examples=100)
def test_own_egress_is_what_the_compiled_check_finds(
    outputs: list[tuple[str, int, bool]], source: str, source_port: int, group: str, port: int
) -> None:
    """A rule for each output; its socket has the port 40 000 and up, on lo, where sources of this host are seen."""
    rules = [
        Rule(
            rule_id=f"r{number}",
            input_group="239.7.7.7",
            input_port=1,
            outputs=(Output(to, to_port, "lo"),),
            preserve_source=preserve,
        )
        for number, (to, to_port, preserve) in enumerate(outputs)
    ]
    sockets, own = [], []
    for number, (to, to_port, preserve) in enumerate(outputs):
        remote = ("0.0.0.0", 0) if preserve else (to, to_port)
        sockets.append(UdpSocket(("10.3.0.1", 40_000 + number), remote, number))
        own.append(OwnSource(None if preserve else "10.3.0.1", 40_000 + number, to, to_port))
    sockets.append(UdpSocket(("10.3.0.1", 40_004), ("239.1.1.1", 5000), 99))  # another program's
    found = own_egress(facts_of(rules, sockets), Datagram(source, source_port, group, port, "lo")).verdict == "stop"
    table = view_table(compile_table((), own, 1))
    assert found is is_own_source(table.view, addressed(source, group, source_port, port))


def test_the_interface_in_whose_network_the_source_is_comes_first() -> None:
    networks = {"a": [("10.1.0.1", "255.255.0.0")], "b": [("10.2.0.1", "255.255.255.0")]}
    assert likely_interface("10.2.0.9", networks, ["a", "b"])[0] == "b"
    assert likely_interface("192.0.2.1", networks, ["a", "b"]) == ("a", "it is the relay's first")
    assert likely_interface("192.0.2.1", networks, ["b"]) == ("b", "the relay takes in from no other")
    assert likely_interface("192.0.2.1", networks, [])[0] is None


def test_the_frame_asked_about_is_whole() -> None:
    raw = frame(Datagram("10.0.0.7", 4000, "239.1.1.1", 5001, "a"))
    assert len(raw) == bpf.FRAME_BYTES_MIN
    assert raw[26:34] == socket.inet_aton("10.0.0.7") + socket.inet_aton("239.1.1.1")
