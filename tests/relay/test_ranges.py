"""Entries with ranges: the rules they stand for, in order, and what is said when they make no sense."""

import contextlib
import ipaddress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.addresses import bracketed
from relay.configfile import examine
from relay.errors import RuleError
from relay.ranges import (
    RULES_OF_A_RANGE_MAX,
    ConfiguredOutput,
    ConfiguredRule,
    ConfiguredSecondary,
    Groups,
    Span,
    expand,
    parse_groups,
    parse_ports,
)
from relay.rules import Address, Output, Rule, Secondary, output_name, parse_output, validate


def entry(**changes: Any) -> ConfiguredRule:
    """An entry of four groups with two ports each, but for `changes`."""
    keys = {
        "rule_id": "cam-{group}-{port}",
        "input_group": "239.1.1.0/30",
        "input_port": "5000-5001",
        "outputs": ("{group}:{port}:eth1",),
    }
    return ConfiguredRule(**{**keys, **changes})


def rules(**changes: Any) -> tuple[Rule, ...]:
    expanded, wrong = expand(entry(**changes))
    assert wrong == ()
    return expanded


def outputs(*texts: str, **changes: Any) -> list[list[str]]:
    return [[output_name(output) for output in rule.outputs] for rule in rules(outputs=texts, **changes)]


def test_groups_come_one_after_the_other_and_ports_within_each() -> None:
    places = [(rule.rule_id, rule.input_group, rule.input_port) for rule in rules()]
    assert places == [
        (f"cam-239.1.1.{group}-{port}", f"239.1.1.{group}", port) for group in range(4) for port in (5000, 5001)
    ]


def test_rules_may_be_numbered_from_one_or_from_elsewhere() -> None:
    assert [rule.rule_id for rule in rules(rule_id="cam-{n}")] == [f"cam-{n}" for n in range(1, 9)]
    assert [rule.rule_id for rule in rules(rule_id="{n+99}")] == [str(n) for n in range(100, 108)]


def test_fields_of_outputs_follow_the_input() -> None:
    assert outputs("239.{g1}.{g3}.{g4+8}:{port+1000}:eth1:9", "10.0.0.7:{n}:eth2", input_port=5000) == [
        [f"239.239.1.{group + 8}:6000:eth1", f"10.0.0.7:{group + 1}:eth2"] for group in range(4)
    ]


def test_ranges_of_outputs_go_along_with_the_inputs() -> None:
    assert outputs("239.2.0.254-239.2.1.1:6000-6001:eth1", "239.3.0.0/30:7:eth1") == [
        [f"{group}:{port}:eth1", f"239.3.0.{index}:7:eth1"]
        for index, group in enumerate(("239.2.0.254", "239.2.0.255", "239.2.1.0", "239.2.1.1"))
        for port in (6000, 6001)
    ]


def test_ranges_of_ipv6_and_their_fields() -> None:
    ways = {"input_group": "FF3E:0::8000:0fc/126", "input_port": 5000}
    made = rules(
        **ways, outputs=("[ff05::{g7}:{g8+1}]:{port}:eth1", "239.2.2.{n}:{port}:eth1", "[{group}]:{port}:eth2")
    )
    assert [rule.input_group for rule in made] == [f"ff3e::8000:{last}" for last in ("fc", "fd", "fe", "ff")]
    assert [output_name(output) for output in made[3].outputs] == [
        "[ff05::8000:100]:5000:eth1", "239.2.2.4:5000:eth1", "[ff3e::8000:ff]:5000:eth2"
    ]  # fmt: skip
    (into,) = rules(input_group="239.1.1.255", input_port=5000, outputs=("[ff3e::8000:{g4}]:{port}:eth1",))
    assert into.outputs == (Output("ff3e::8000:255", 5000, "eth1"),)


def test_an_output_may_be_a_table_with_ranges() -> None:
    output = ConfiguredOutput(group="239.2.0.0/30", port="{port}", interface="eth1", ttl="decrement", dscp=34)
    assert rules(outputs=(output,))[7].outputs == (Output("239.2.0.3", 5001, "eth1", "decrement", 34),)


def test_rules_without_a_name_are_named_by_their_content() -> None:
    names = [rule.rule_id for rule in rules(rule_id="")]
    assert len(set(names)) == 8
    assert all(name.startswith("r-") for name in names)


def test_an_entry_without_a_range_is_one_rule() -> None:
    expected = Rule(
        rule_id="tv", input_group="239.1.1.1", input_port=5001, outputs=(parse_output("239.2.2.2:6001:lo:3"),)
    )
    assert rules(rule_id="tv", input_group="239.1.1.1", input_port=5001, outputs=("239.2.2.2:6001:lo:3",)) == (
        expected,
    )
    ways = {"input_group": "239.1.1.1/32", "input_port": "5001-5001", "outputs": ("239.2.{g2+1}.2:{port+1000}:lo:3",)}
    assert rules(rule_id="tv", **ways) == (expected,)


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        ({"rule_id": "cam"}, ("rule_id",), "would name all 8 rules: add {group}, {port} or {n}"),
        ({"rule_id": "cam-{group}"}, ("rule_id",), "names several rules cam-239.1.1.0: add"),
        ({"rule_id": "cam-{grp}-{n}"}, ("rule_id",), "no field {grp}; there are {group}, {port}, {n}"),
        ({"rule_id": "{n"}, ("rule_id",), "a brace without its other one"),
        ({"input_group": "239.1.1.5/24"}, ("input_group",), "this network begins at 239.1.1.0/24"),
        ({"input_group": "239.1.1.0/33"}, ("input_group",), "give a prefix from 0 to 32"),
        ({"input_group": "239.1.1.9-239.1.1.3"}, ("input_group",), "give the lower address first"),
        ({"input_group": "239.1.1.9-12"}, ("input_group",), "'12' is not an address"),
        ({"input_group": "ff3e::5/120"}, ("input_group",), "this network begins at ff3e::/120"),
        ({"input_group": "ff3e::/129"}, ("input_group",), "give a prefix from 0 to 128, such as ff3e::8000:0/120"),
        ({"input_group": "ff3e::/96"}, ("input_group",), "8589934592 rules, of one entry at most 10000"),
        ({"input_group": "239.1.1.1-ff3e::2"}, ("input_group",), "a range has addresses of one family"),
        ({"input_group": "fe80::1%eth0"}, ("input_group",), "leave out %eth0, the interface is given besides"),
        ({"input_group": "ff3e::1%eth0/128"}, ("input_group",), "leave out %eth0"),
        ({"rule_id": "{g5}-{n}"}, ("rule_id",), "no field {g5}; there are {group}, {port}, {n}, {g1} to {g4}"),
        ({"input_group": "239.1.0.0/16"}, ("input_group",), "131072 rules, of one entry at most 10000"),
        ({"input_group": "0.0.0.0/0"}, ("input_group",), "of one entry at most 10000: make the range smaller"),
        ({"input_group": "239.1.1.1", "input_port": "1-65535"}, ("input_port",), "65535 rules, of one entry at most"),
        ({"input_port": "5001-5000"}, ("input_port",), "give the lower port first"),
        ({"input_port": "0-9"}, ("input_port",), "give a port from 1 to 65535, or a range such as 5000-5099"),
        ({"input_port": "65530-65536"}, ("input_port",), "give a port from 1 to 65535"),
        ({"outputs": ("239.2.1.0/29:1:lo",)}, ("outputs", 0), "has 8 addresses, the input 4: give as many, or one"),
        ({"outputs": ("{group}:6000-6002:lo",)}, ("outputs", 0), "has 3 ports, the input 2: give as many, or one"),
        ({"outputs": ("{group}:{port+60536}:lo",)}, ("outputs", 0, "port"), "output port 65536: give a port from 1"),
        ({"outputs": ("{group}:{port-5000}:lo",)}, ("outputs", 0, "port"), "output port 0: give a port from 1"),
        ({"outputs": ("{group}:{port-9999}:lo",)}, ("outputs", 0), "output port -4999: give a port from 1"),
        ({"outputs": ("239.1.1.{g4+254}:1:lo",)}, ("outputs", 0, "group"), "'239.1.1.256' is not an address"),
        ({"outputs": ("{group+1}:1:lo",)}, ("outputs", 0), "no field {group+1}; there are"),
        ({"outputs": ("{group}:1:lo", "{group}:1:lo")}, ("outputs",), "is given twice: remove one"),
        ({"outputs": ()}, ("outputs",), "0 outputs; give from 1"),
    ],
)
def test_what_makes_no_sense_is_said_where_it_stands(changes: dict[str, Any], key: object, message: str) -> None:
    expanded, wrong = expand(entry(**changes))
    assert expanded == ()
    assert [(path, message in reason) for path, reason in wrong] == [(key, True)], wrong


IPV4 = st.integers(1 << 24, 0xDFFFFFFF).map(ipaddress.IPv4Address)
IPV6 = st.integers(0x2000 << 112, 0xFE7F << 112).map(ipaddress.IPv6Address)
ADDRESSES = IPV4 | IPV6
GROUP_SPANS = st.tuples(ADDRESSES, st.integers(1, 12)).map(lambda pair: Groups(*pair))
PORT_SPANS = st.tuples(st.integers(1, 65_000), st.integers(1, 12)).map(lambda pair: Span(*pair))


def text_of(groups: Groups) -> str:
    return f"{groups.first}-{groups.first + groups.count - 1}"


@given(GROUP_SPANS, PORT_SPANS, ADDRESSES)
def test_count_order_and_names_are_those_of_the_ranges(groups: Groups, ports: Span, output: Address) -> None:
    ports_text = f"{ports.first}-{ports.first + ports.count - 1}"
    output_range = bracketed(text_of(Groups(output, groups.count)))
    expanded = rules(input_group=text_of(groups), input_port=ports_text, outputs=(f"{output_range}:{ports_text}:eth1",))
    assert len(expanded) == len({rule.rule_id for rule in expanded}) == groups.count * ports.count
    keys = [(int(ipaddress.ip_address(rule.input_group)), rule.input_port) for rule in expanded]
    assert keys == sorted(keys)
    assert (keys[0], keys[-1]) == (
        (int(groups.first), ports.first),
        (int(groups.first) + groups.count - 1, ports.first + ports.count - 1),
    )
    for (group, port), rule in zip(keys, expanded, strict=True):
        validate(rule)
        (to,) = rule.outputs
        assert int(ipaddress.ip_address(to.group)) - int(output) == group - int(groups.first)
        assert to.port == port


@given(st.text("0123456789./-:{}+gnport ", max_size=24), st.text("0123456789-{}", max_size=8))
def test_no_text_fails_otherwise(group: str, port: str) -> None:
    with contextlib.suppress(RuleError):
        parse_groups("group", group)
    with contextlib.suppress(RuleError):
        parse_ports("port", port)
    expanded, wrong = expand(entry(input_group=group, input_port=port, rule_id=group, outputs=(group,)))
    assert bool(expanded) is not bool(wrong)


def test_the_largest_range_is_what_the_limit_says() -> None:
    assert len(rules(input_group="239.1.0.0-239.1.0.99", input_port="5000-5099")) == RULES_OF_A_RANGE_MAX


RANGE = '[[rules]]\nrule_id = "{0}-{{n}}"\ninput_group = "{1}"\ninput_port = 1\noutputs = ["{{group}}:2:lo"]\n{2}\n'


@pytest.mark.parametrize(
    ("first", "second", "overlap"),
    [
        (("239.1.1.0/24", ""), ("239.1.1.128-239.1.2.5", ""), True),
        (("239.1.1.0/24", ""), ("239.1.1.7", ""), True),
        (("239.1.1.0/24", ""), ("239.1.2.0/24", ""), False),
        (("239.1.1.0/24", 'source = "10.0.0.1"'), ("239.1.1.0/24", 'source = "10.0.0.2"'), False),
        (("239.1.1.0/24", 'source = "10.0.0.1"'), ("239.1.1.0/24", ""), True),
        (("239.1.1.0/24", 'input_interface = "a"'), ("239.1.1.0/24", 'input_interface = "b"'), False),
        (("239.1.1.7", ""), ("239.1.1.7", ""), False),  # who writes it twice by hand may mean it
    ],
)
def test_ranges_that_overlap_are_refused(first: tuple[str, str], second: tuple[str, str], overlap: bool) -> None:
    for a, b in ((first, second), (second, first)):
        findings = examine(RANGE.format("a", *a) + RANGE.format("b", *b), "f").findings
        assert bool(findings) is overlap
        assert all("overlaps with rule" in finding.message for finding in findings)


def test_names_that_two_ranges_give_are_refused() -> None:
    text = RANGE.format("a", "239.1.1.0/24", "") + RANGE.format("a", "239.1.2.0/24", "")
    assert "f:7: rules[1]: rule id a-1 is given twice, here and in rules[0]" in str(examine(text, "f").findings[0])


def test_a_file_of_more_rules_than_a_relay_holds_is_refused_before_they_are_made() -> None:
    text = "".join(RANGE.format(f"r{i}", f"239.{i}.0.0/19", "") for i in range(100))
    (finding,) = examine(text, "f").findings
    assert "f:13: rules[2]: more than 16384 rules" in str(finding)


def test_a_second_input_follows_the_ranges_of_the_first() -> None:
    def seconds(**secondary: Any) -> list[Any]:
        made = rules(secondary=ConfiguredSecondary(**secondary), protection="seamless")
        return [rule.secondary for rule in made]

    assert seconds(input_port=7) == [Secondary(input_port=7)] * 8
    assert seconds(input_group="239.1.9.0/30", input_port="{port+10}")[2:4] == [
        Secondary(input_group="239.1.9.1", input_port=5010),
        Secondary(input_group="239.1.9.1", input_port=5011),
    ]
    assert seconds(input_group="239.9.{g3}.{g4}", source="10.0.0.1")[-1] == Secondary(
        input_group="239.9.1.3", source="10.0.0.1"
    )


@pytest.mark.parametrize(
    ("secondary", "reason"),
    [
        ({"input_group": "239.1.9.0/29"}, "secondary input group 239.1.9.0/29 has 8 addresses, the input 4"),
        ({"input_port": "{nonsense}"}, "no field {nonsense}"),
        ({"input_port": "{port+60535}"}, "secondary input port 65536"),
        ({}, "the secondary input is the primary"),
    ],
)
def test_a_second_input_that_makes_no_sense_is_told_once(secondary: dict[str, Any], reason: str) -> None:
    made, wrong = expand(entry(secondary=ConfiguredSecondary(**secondary), protection="seamless"))
    assert made == ()
    ((_, told),) = wrong
    assert reason in told
