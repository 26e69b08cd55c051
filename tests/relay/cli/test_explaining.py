"""What explain says of rules is what the compiled matcher finds; what passes the filter is the kernel's word."""

import dataclasses
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from relay import bpf
from relay.cli import host
from relay.cli.explain import parse_endpoint
from relay.cli.explaining.explanation import explain
from relay.cli.explaining.facts import Datagram, Facts
from relay.cli.explaining.rules import differences, matching, nearest
from relay.cli.explaining.way_in import admits, frame, join, likely_interface, own_egress
from relay.cli.host import IFF_LOOPBACK, IFF_UP, UdpSocket
from relay.dataplane.match import NO_ENTRY, is_own_source, match
from relay.dataplane.table import OwnSource, TableRule, compile_table, view_table
from relay.errors import UsageError
from relay.rules import Output, Protection, Rule, Secondary
from relay.supervisor.interfaces import Interface
from relay.supervisor.plan import Plan, make_plan
from tests.relay.dataplane.bare import addressed

INTERFACES = {
    name: Interface(name, index, True, True, 1500, (f"10.{index}.0.1",))
    for index, name in enumerate(("a", "b", "lo"), 1)
}
GROUPS = st.sampled_from(["239.1.1.1", "10.1.0.1", "ff3e::1"])
PORTS = st.sampled_from([5000, 5001])
SOURCES = st.sampled_from(["10.0.0.7", "10.0.0.8", "fd00::7"])
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
        hop_limits={},
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

    networks = {
        "a": [("fd00:1::1", "ffff:ffff::"), ("10.1.0.1", "255.255.0.0")],
        "b": [("fd00:1:2::1", "ffff:" * 3 + ":")],
    }
    assert likely_interface("fd00:1:3::9", networks, ["a", "b"]) == ("a", "fd00:1:3::9 is in its network fd00:1::/32")
    assert likely_interface("fd00:1:2::9", {"b": networks["b"]}, ["a", "b"])[0] == "b"
    networks = {"b": [("fe80::1", "ffff:ffff:ffff:ffff::")]}
    assert likely_interface("fe80::9", networks, ["a", "b"]) == ("a", "it is the relay's first")


def test_the_frame_asked_about_is_whole() -> None:
    raw = frame(Datagram("10.0.0.7", 4000, "239.1.1.1", 5001, "a"))
    assert len(raw) == bpf.FRAME_BYTES_MIN
    assert raw[26:34] == socket.inet_aton("10.0.0.7") + socket.inet_aton("239.1.1.1")
    raw6 = frame(Datagram("fd00::7", 4000, "ff3e::1", 5001, "a"))
    parsed = Ether(raw6)
    assert (parsed[IPv6].src, parsed[IPv6].dst, parsed[UDP].dport, parsed[UDP].sport) == (
        "fd00::7",
        "ff3e::1",
        5001,
        4000,
    )
    assert bytes(parsed) == raw6
    assert admits(bpf.assemble({("ff3e::1", 5001)}), raw6)
    assert not admits(bpf.assemble({("ff3e::1", 5002), ("ff3e::2", 5001)}), raw6)


@pytest.mark.parametrize(
    ("text", "needs_port", "found"),
    [
        ("10.0.0.7", False, ("10.0.0.7", None)),
        ("10.0.0.7:5", False, ("10.0.0.7", 5)),
        ("fd00::7", False, ("fd00::7", None)),
        ("[FD00:0::7]", False, ("fd00::7", None)),
        ("[ff3e::1]:5000", True, ("ff3e::1", 5000)),
    ],
)
def test_endpoints_are_read(text: str, needs_port: bool, found: tuple[str, int | None]) -> None:
    assert parse_endpoint(text, "source", needs_port) == found


@pytest.mark.parametrize(
    "text", ["ff3e::1", "[ff3e::1]", "[ff3e::1]5000", "[ff3e::1]:x", "[ff3e::1", "fe80::1%a", ":1"]
)
def test_endpoints_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="destination"):
        parse_endpoint(text, "destination", needs_port=True)


def test_an_ipv6_datagram_is_followed_as_an_ipv4_one() -> None:
    rule = Rule(rule_id="r", input_group="ff3e::1", input_port=5001, outputs=(Output("ff3e::2", 6001, "lo"),))
    interfaces = {"lo": Interface("lo", 1, True, True, 1500, (), ("fd00::1", "fe80::1"))}
    joined = host.joined("", "1    lo ff3e0000000000000000000000000001     1 00000004 0")
    facts = dataclasses.replace(
        facts_of([], []),
        plan=make_plan([rule], interfaces, ("lo",)),
        interfaces=interfaces,
        joined=joined,
        workers=({"state": "running"},),
    )
    found = explain(facts, Datagram("fd00::7", None, "ff3e::1", 5001, "lo"))
    assert found.relayed, found.summary
    reasons = {step.step.partition(" ")[0]: step.reason for step in found.steps}
    assert reasons["join"] == "ff3e::1 is joined on lo, any source"
    assert reasons["rule"] == "rule r takes [ff3e::1]:5001"
    assert "to [ff3e::2]:6001 from fd00::1 with hop limit 1; payloads over 1452 bytes" in reasons["output"]
    other = explain(facts, Datagram("fd00::7", None, "ff3e::1", 5002, "lo"))
    assert "keeps [ff3e::1]:5002 out" in {step.step: step.reason for step in other.steps}["filter"]


def test_a_source_that_the_kernel_does_not_show_is_no_refusal() -> None:
    """Of /proc/net/mcfilter, the sources of groups behind one that has none are missing."""
    rule = Rule(
        rule_id="r", input_group="ff3e::1", input_port=5001, source="fd00::7", outputs=(Output("ff3e::2", 6001, "lo"),)
    )
    interfaces = {"lo": Interface("lo", 1, True, True, 1500, (), ("fd00::1",))}
    plan = make_plan([rule], interfaces, ("lo",))
    joined = host.joined("", "1    lo ff3e0000000000000000000000000001     1 00000004 0")
    facts = dataclasses.replace(facts_of([], []), plan=plan, interfaces=interfaces, joined=joined)
    header = "Idx Device                Multicast Address                   Source Address    INC    EXC\n"
    row = f"  1     lo {'ff3e' + '0' * 27}1 {'fd00' + '0' * 27}{{}}      1      0\n"
    for text, verdict in ((header, "note"), (header + row.format(7), "pass"), (header + row.format(8), "stop")):
        shown = dataclasses.replace(facts, source_filters=host.source_filters(text))
        assert join(shown, Datagram("fd00::7", None, "ff3e::1", 5001, "lo")).verdict == verdict


@pytest.mark.parametrize(
    ("group", "protection", "verdict", "words"),
    [
        ("239.1.1.1", "seamless", "note", "by the primary leg: the first copy of each RTP sequence number leaves"),
        ("239.1.1.2", "seamless", "note", "withheld if it has come by the primary leg, 239.1.1.1:5000, before"),
        ("239.1.1.1", "failover", "pass", "by the primary leg, and the primary one is relayed now"),
        ("239.1.1.2", "failover", "note", "withheld as long as datagrams come by the primary leg, 239.1.1.1:5000"),
    ],
)
def test_a_datagram_of_either_leg_is_taken_and_what_becomes_of_it_is_said(
    group: str, protection: Protection, verdict: str, words: str
) -> None:
    tv = Rule(
        rule_id="tv",
        input_group="239.1.1.1",
        input_port=5000,
        outputs=(Output("239.9.9.9", 6000, "b"),),
        secondary=Secondary(input_group="239.1.1.2"),
        protection=protection,
        stall_ms=100,
    )
    found = explain(facts_of([tv], []), Datagram("10.0.0.7", None, group, 5000, "lo"))
    steps = {step.step: step for step in found.steps}
    assert steps["rule"].reason == f"rule tv takes {group}:5000"
    assert steps["protection"].verdict == verdict
    assert words in steps["protection"].reason
