"""Rules as values: what is refused and why, names, merging, cycles."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.dataplane import layout
from relay.errors import RuleError
from relay.rules import (
    OUTPUTS_MAX,
    RULES_MAX,
    WARNINGS_MAX,
    Leg,
    Output,
    Rule,
    Secondary,
    chain_warnings,
    check_cycles,
    check_protected,
    check_room,
    content_id,
    describe,
    legs,
    merge,
    named,
    parse_output,
    parse_ttl,
    split_secondary,
    validate,
)


def rule(rule_id: str, source: str, *outputs: str, interface: str | None = None) -> Rule:
    """A rule from `group:port` to `group:port:interface` texts."""
    group, port = source.split(":")
    return Rule(
        rule_id=rule_id,
        input_group=group,
        input_port=int(port),
        outputs=tuple(parse_output(text) for text in outputs),
        input_interface=interface,
    )


def by_id(*rules: Rule) -> dict[str, Rule]:
    return {r.rule_id: r for r in rules}


@pytest.mark.parametrize(
    ("text", "output"),
    [
        ("239.2.2.2:6001:lo", Output("239.2.2.2", 6001, "lo")),
        ("239.2.2.2:6001:lo:9", Output("239.2.2.2", 6001, "lo", 9)),
        ("10.0.0.1:1:eth0.5:decrement", Output("10.0.0.1", 1, "eth0.5", "decrement")),
        ("[ff3e::1]:5000:eth1", Output("ff3e::1", 5000, "eth1")),
        ("[fe80::1]:5000:eth1:decrement", Output("fe80::1", 5000, "eth1", "decrement")),
    ],
)
def test_outputs_are_read_from_text(text: str, output: Output) -> None:
    assert parse_output(text) == output


@pytest.mark.parametrize(
    "text",
    [
        "",
        "239.2.2.2",
        "239.2.2.2:x:lo",
        "239.2.2.2:1:lo:0",
        "239.2.2.2:1:",
        "ff3e::1:1:lo",
        "[239.2.2.2]:1:lo",
        "[]:1:lo",
    ],
)
def test_outputs_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(RuleError):
        parse_output(text)


@given(st.text(max_size=40))
def test_no_text_makes_the_output_parser_fail_otherwise(text: str) -> None:
    try:
        validate(Rule(rule_id="r", input_group="239.1.1.1", input_port=1, outputs=(parse_output(text),)))
    except RuleError as error:
        assert str(error)


@pytest.mark.parametrize("ttl", ["0", "256", "-1", "", "dec"])
def test_ttl_out_of_range_is_refused(ttl: str) -> None:
    with pytest.raises(RuleError, match="from 1 to 255"):
        parse_ttl(ttl)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule_id": "a b"}, "rule id"),
        ({"rule_id": "x" * 65}, "up to 64"),
        ({"input_group": "0.0.0.0"}, "neither a multicast group nor a unicast address"),
        ({"input_group": "255.255.255.255"}, "neither"),
        ({"input_port": 70_000}, "from 1 to 65535"),
        ({"source": "239.1.1.1"}, "give a sender's unicast address"),
        ({"max_pps": 0}, "max_pps 0: give from 1 to 100000000, or leave it out for no limit"),
        ({"max_pps": 100_000_001}, "max_pps 100000001: give from 1"),
        ({"max_bps": 999}, "max_bps 999: give from 1000 to 1000000000000"),
        ({"max_bps": 1_000_000_000_001}, "from 1000 to"),
        ({"outputs": ()}, "0 outputs"),
        ({"input_group": "::"}, "neither a multicast group nor a unicast address"),
        ({"input_group": "ff10::1"}, "neither"),
        ({"input_group": "fe80::1%eth0"}, "leave out %eth0, the interface is given besides: fe80::1"),
        ({"input_group": "::ffff:239.1.1.1"}, "is IPv4 in an IPv6 address: give 239.1.1.1"),
        ({"input_group": "[ff3e::1]"}, "is not an address such as 239.1.1.1 or ff3e"),
        ({"source": "2001:db8::7"}, "source 2001:db8::7 never sends to 239.1.1.1: give an IPv4 address"),
        ({"input_group": "ff3e::1", "source": "10.0.0.7"}, "give an IPv6 address"),
        ({"input_group": "ff3e::1", "source": "ff3e::1"}, "give a sender's unicast address"),
        ({"input_group": "ff3e::1", "preserve_source": True}, "output 239.2.2.2:1:lo is not IPv6 as the input"),
        (
            {"outputs": (Output("ff3e::1", 1, "lo"), Output("FF3E:0::1", 1, "lo", 5))},
            r"output \[ff3e::1\]:1:lo is given twice",
        ),
        ({"outputs": (Output("239.2.2.2", 1, "lo"), Output("239.2.2.2", 1, "lo", 5))}, "given twice"),
        ({"outputs": (Output("239.2.2.2", 1, "lo", dscp=64),)}, "dscp 64"),
    ],
)
def test_rules_that_cannot_work_are_refused(changes: dict[str, object], message: str) -> None:
    fields = {"rule_id": "r", "input_group": "239.1.1.1", "input_port": 1, "outputs": (Output("239.2.2.2", 1, "lo"),)}
    with pytest.raises(RuleError, match=message):
        validate(Rule(**{**fields, **changes}))  # type: ignore[arg-type]


def test_an_ipv6_address_has_one_form_however_it_is_written() -> None:
    plain = Rule(
        input_group="ff3e::8000:1", input_port=1, source="2001:db8::7", outputs=(Output("2001:db8::9", 1, "lo"),)
    )
    odd = Rule(
        input_group="FF3E:0:0::8000:0001",
        input_port=1,
        source="2001:0DB8::0.0.0.7",
        outputs=(Output("2001:db8:0:0:0:0:0:9", 1, "lo"),),
    )
    assert named(odd) == named(plain)
    assert validate(msgspec.structs.replace(odd, rule_id="r")) == msgspec.structs.replace(plain, rule_id="r")


def test_a_second_leg_has_that_form_too_and_its_source_is_of_its_family() -> None:
    fields: dict[str, Any] = {"rule_id": "r", "input_group": "239.1.1.1", "input_port": 1, "protection": "seamless"}
    fields["outputs"] = (Output("239.2.2.2", 1, "lo"),)
    second = Secondary(input_group="FF3E:0::1", source="2001:DB8::7")
    checked = validate(Rule(**fields, secondary=second))
    assert checked.secondary == Secondary(input_group="ff3e::1", source="2001:db8::7")
    for secondary, source in ((Secondary(input_group="ff3e::1"), "10.0.0.7"), (second, None)):
        if source is None:
            with pytest.raises(RuleError, match=r"output 239\.2\.2\.2:1:lo is not IPv6 as the input \[ff3e::1\]:1 is"):
                validate(Rule(**fields, secondary=secondary, preserve_source=True))
        else:
            with pytest.raises(RuleError, match=r"source 10\.0\.0\.7 never sends to ff3e::1: give an IPv6 address"):
                validate(Rule(**fields, secondary=secondary, source=source))


def test_names_of_rules_without_one_are_what_they_have_been() -> None:
    assert named(rule("", "239.1.1.1:5001", "239.2.2.2:6001:lo")).rule_id == "r-b59b9701de45"


def test_the_hash_of_a_rule_depends_on_its_content_alone() -> None:
    first = rule("one", "239.1.1.1:1", "239.2.2.2:1:lo")
    second = rule("two", "239.1.1.1:1", "239.2.2.2:1:lo")
    other = rule("one", "239.1.1.1:2", "239.2.2.2:1:lo")
    assert content_id(first) == content_id(second) != content_id(other)
    assert content_id(first) == "r-94b88a8a41e2"  # as before there were limits and stalls
    limited = msgspec.structs.replace(first, max_pps=1)
    assert len({content_id(first), content_id(limited), content_id(msgspec.structs.replace(limited, max_pps=2))}) == 3
    assert named(rule("", "239.1.1.1:1", "239.2.2.2:1:lo")).rule_id == content_id(first)


def test_an_output_equal_to_the_input_is_a_loop_on_the_same_interface_only() -> None:
    loop = rule("r", "239.1.1.1:1", "239.1.1.1:1:a", interface="a")
    with pytest.raises(RuleError, match="equals its input"):
        check_cycles([loop], by_id(loop), ["a"])
    across = rule("r", "239.1.1.1:1", "239.1.1.1:1:b", interface="a")
    check_cycles([across], by_id(across), ["a", "b"])
    everywhere = rule("r", "239.1.1.1:1", "239.1.1.1:1:b")
    with pytest.raises(RuleError, match="equals its input"):
        check_cycles([everywhere], by_id(everywhere), ["a", "b"])


@given(st.integers(2, 30), st.integers(0, 29))
def test_a_ring_of_rules_is_a_cycle_wherever_it_is_closed(length: int, closed_at: int) -> None:
    rules = [rule(f"r{i}", f"239.1.1.{i}:1", f"239.1.1.{(i + 1) % length}:1:a") for i in range(length)]
    last = rules[closed_at % length]
    with pytest.raises(RuleError, match="cycle through rules"):
        check_cycles([last], by_id(*rules), ["a"])
    open_chain = [r for r in rules if r is not last]
    check_cycles(open_chain, by_id(*open_chain), ["a"])


def test_a_chain_within_the_relay_warns_whichever_end_is_added() -> None:
    first, second = rule("a", "239.1.1.1:1", "239.1.1.2:1:x"), rule("b", "239.1.1.2:1", "239.1.1.3:1:x")
    for added in (first, second):
        (warning,) = chain_warnings([added], by_id(first, second), ["x"])
        assert "rule a sends what rule b listens to" in warning
    assert chain_warnings([first], by_id(first, second), ["y"]) == []


def test_merging_adds_what_is_new_and_refuses_what_differs() -> None:
    kept, changed = rule("kept", "239.1.1.1:1", "239.2.2.2:1:x"), rule("changed", "239.1.1.2:1", "239.2.2.2:1:x")
    other = rule("changed", "239.1.1.9:1", "239.2.2.2:1:x")
    new = rule("new", "239.1.1.3:1", "239.2.2.2:1:x")
    active = by_id(kept, changed)
    assert merge(active, [kept, new], replace=False) == ((new,), ())
    assert merge(active, [other], replace=True) == ((other,), ("changed",))
    with pytest.raises(RuleError, match="use --replace"):
        merge(active, [other], replace=False)
    with pytest.raises(RuleError, match="given twice"):
        merge(active, [new, new], replace=False)


def test_limits_are_those_of_the_tables() -> None:
    assert (RULES_MAX, OUTPUTS_MAX) == (layout.RULES_MAX, layout.OUTPUTS_MAX)
    check_room([rule("r", "239.1.1.1:1", "239.2.2.2:1:a")] * RULES_MAX)
    with pytest.raises(RuleError, match="over the limits"):
        check_room([rule("r", "239.1.1.1:1", "239.2.2.2:1:a")] * (RULES_MAX + 1))


@pytest.mark.parametrize("interface", ["", "a b", "a/b", "..", "x" * 16, "a\nb"])
def test_what_is_no_interface_name_is_refused(interface: str) -> None:
    for changes in ({"outputs": (Output("239.2.2.2", 1, interface),)}, {"input_interface": interface}):
        fields = {
            "rule_id": "r",
            "input_group": "239.1.1.1",
            "input_port": 1,
            "outputs": (Output("239.2.2.2", 1, "a"),),
        }
        with pytest.raises(RuleError, match="interface"):
            validate(Rule(**{**fields, **changes}))  # type: ignore[arg-type]


def test_thousands_of_rules_that_feed_each_other_are_checked_place_by_place() -> None:
    """Rule by rule these were 64 million steps: minutes, during which a privileged process does nothing else."""
    feeding = [rule(f"a{i}", f"10.0.{i >> 8}.{i & 255}:1", "239.1.1.1:1:a") for i in range(8000)]
    fed = [rule(f"b{i}", "239.1.1.1:1", f"10.1.{i >> 8}.{i & 255}:1:a") for i in range(8000)]
    check_cycles([*feeding, *fed], by_id(*feeding, *fed), ["a"])
    assert len(chain_warnings([*feeding, *fed], by_id(*feeding, *fed), ["a"])) == WARNINGS_MAX
    back = rule("back", "10.1.0.0:1", "10.0.0.0:1:a")
    with pytest.raises(RuleError, match="cycle through rules"):
        check_cycles([back], by_id(*feeding, *fed, back), ["a"])


def slow_cycle(added: list[Rule], rules: list[Rule], interfaces: list[str]) -> bool:
    """Whether an added rule can be reached from itself, the obvious way."""

    def fed_by(sender: Rule) -> list[Rule]:
        return [
            follower
            for follower in rules
            for output in sender.outputs
            if (output.group, output.port) == (follower.input_group, follower.input_port)
            and output.interface in ([follower.input_interface] if follower.input_interface else interfaces)
        ]

    def reaches(sender: Rule, target: Rule, seen: list[str]) -> bool:
        return any(
            follower.rule_id == target.rule_id
            or (follower.rule_id not in seen and reaches(follower, target, [*seen, follower.rule_id]))
            for follower in fed_by(sender)
        )

    return any(reaches(r, r, [r.rule_id]) for r in added)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.sampled_from([None, "a", "b"])), max_size=7))
def test_cycles_are_found_as_the_obvious_way_finds_them(edges: list[tuple[int, int, str | None]]) -> None:
    rules = [
        rule(f"r{i}", f"239.1.1.{start}:1", f"239.1.1.{end}:1:{'ab'[i % 2]}", interface=interface)
        for i, (start, end, interface) in enumerate(edges)
    ]
    try:
        check_cycles(rules, by_id(*rules), ["a"])
        found = False
    except RuleError:
        found = True
    assert found is slow_cycle(rules, rules, ["a"])


def protected(rule_id: str, at: str, *outputs: str, interface: str | None = None, **secondary: object) -> Rule:
    """A seamless rule of two inputs."""
    plain = rule(rule_id, at, *(outputs or ("239.2.2.2:1:b",)), interface=interface)
    second = msgspec.convert(secondary, Secondary)
    return msgspec.structs.replace(plain, secondary=second, protection="seamless")


@pytest.mark.parametrize(
    ("secondary", "leg"),
    [
        ({"input_group": "239.1.2.1"}, Leg("239.1.2.1", 5001, "a", None)),
        ({"input_port": 5002}, Leg("239.1.1.1", 5002, "a", None)),
        ({"input_interface": "b"}, Leg("239.1.1.1", 5001, "b", None)),
        ({"input_interface": "b", "source": "10.0.0.1"}, Leg("239.1.1.1", 5001, "b", "10.0.0.1")),
    ],
)
def test_a_second_leg_is_as_the_first_but_for_what_it_says(secondary: dict[str, object], leg: Leg) -> None:
    checked = validate(protected("tv", "239.1.1.1:5001", interface="a", **secondary))
    assert legs(checked) == (Leg("239.1.1.1", 5001, "a", None), leg)
    assert str(leg) in describe(checked)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"secondary": None}, "protection seamless needs a secondary input"),
        ({"protection": None}, "a secondary input needs protection: seamless for RTP, failover"),
        ({"protection": "failover"}, "failover needs stall_ms"),
        ({"secondary": Secondary()}, "the secondary input is the primary"),
        ({"secondary": Secondary(input_interface="b")}, "may be of both inputs, .*: name an interface or a source"),
        ({"secondary": Secondary(source="10.0.0.1")}, "may be of both inputs"),
        ({"secondary": Secondary(input_group="nonsense")}, "secondary input group 'nonsense' is not an address"),
        ({"secondary": Secondary(input_port=0)}, "secondary input port 0"),
        ({"secondary": Secondary(input_group="239.1.2.1", input_interface="a/b")}, "secondary input interface 'a/b'"),
        ({"secondary": Secondary(input_group="239.1.2.1", source="239.1.1.1")}, "source 239.1.1.1 is a multicast"),
    ],
)
def test_protection_that_makes_no_sense_is_refused_with_the_remedy(changes: dict[str, object], reason: str) -> None:
    sound = protected("tv", "239.1.1.1:5001", input_group="239.1.2.1")
    with pytest.raises(RuleError, match=reason):
        validate(msgspec.structs.replace(sound, **changes))


def test_legs_of_one_group_are_told_apart_by_interfaces_or_sources() -> None:
    validate(protected("tv", "239.1.1.1:5001", interface="a", input_interface="b"))
    by_source = protected("tv", "239.1.1.1:5001", source="10.0.0.2")
    validate(msgspec.structs.replace(by_source, source="10.0.0.1"))


def test_two_protected_rules_that_share_an_input_are_refused_and_an_unprotected_one_is_not() -> None:
    tv = protected("tv", "239.1.1.1:5001", input_group="239.1.2.1")
    check_protected([tv, rule("other", "239.1.1.1:5001", "239.2.2.2:1:b")], ["a", "b"])
    radio = protected("radio", "239.1.3.1:5001", input_group="239.1.2.1", input_interface="b")
    with pytest.raises(RuleError, match=r"rules tv and radio both protect 239\.1\.2\.1:5001 on b"):
        check_protected([tv, radio], ["a", "b"])
    check_protected([tv, radio], ["a"])  # where the other does not listen
    first, second = (msgspec.structs.replace(each, source=f"10.0.0.{i}") for i, each in enumerate((tv, radio), 1))
    check_protected([first, second], ["a", "b"])


def test_a_loop_through_a_second_leg_is_refused() -> None:
    tv = protected("tv", "239.1.1.1:5001", "239.1.2.1:5001:b", interface="a", input_group="239.1.2.1")
    check_cycles([tv], by_id(tv), ["a", "b"])
    looped = protected("tv", "239.1.1.1:5001", "239.1.2.1:5001:a", interface="a", input_group="239.1.2.1")
    with pytest.raises(RuleError, match="a loop"):
        check_cycles([looped], by_id(looped), ["a", "b"])
    feeder = rule("feeder", "239.9.9.9:1", "239.1.2.1:5001:a")
    assert "rule feeder sends what rule tv listens to" in chain_warnings([tv], by_id(tv, feeder), ["a"])[0]


def test_names_of_rules_are_what_they_were_before_there_was_protection() -> None:
    assert content_id(rule("", "239.1.1.1:5001", "239.2.2.2:1:b")) == "r-85b8cd863114"
    assert content_id(protected("", "239.1.1.1:5001", input_port=7)) != content_id(
        rule("", "239.1.1.1:5001", "239.2.2.2:1:b")
    )


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("239.1.2.1:5001", ("239.1.2.1", "5001", None)),
        ("239.1.2.1:5001:eth1", ("239.1.2.1", "5001", "eth1")),
        ("239.1.2.1", ("239.1.2.1", None, None)),
        (":5002", (None, "5002", None)),
        ("::eth1", (None, None, "eth1")),
        ("[ff3e::1]:5001:eth1", ("ff3e::1", "5001", "eth1")),
    ],
)
def test_a_second_input_is_read_from_text(text: str, parts: tuple[str | None, ...]) -> None:
    assert split_secondary(text) == parts


@pytest.mark.parametrize("text", ["", "::", "239.1.2.1:5001:eth1:9"])
def test_a_second_input_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(RuleError, match="GROUP:PORT"):
        split_secondary(text)
