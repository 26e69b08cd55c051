"""What rules need of the host, for either family."""

import pytest

from relay.rules import Output, Rule
from relay.supervisor.interfaces import Interface
from relay.supervisor.membership import Listen
from relay.supervisor.plan import make_plan

INTERFACES = {
    name: Interface(name, index, True, True, 1500, ("10.1.0.1",), ("fd00:1::1", "fe80::1"))
    for index, name in enumerate(("left", "both"), 2)
} | {"right": Interface("right", 9, True, True, 1500, (), ("fe80::9",))}


@pytest.mark.parametrize(
    ("group", "listens"),
    [
        ("ff3e::1", {Listen("ff3e::1", 0, 2, None), Listen("ff3e::1", 0, 3, None)}),
        ("fd00:1::1", {Listen("fd00:1::1", 5001, 0, None)}),
        ("fe80::1", {Listen("fe80::1", 5001, 2, None), Listen("fe80::1", 5001, 3, None)}),
    ],
)
def test_an_ipv6_input_is_joined_or_held_and_admitted(group: str, listens: set[Listen]) -> None:
    rule = Rule(rule_id="r", input_group=group, input_port=5001, outputs=(Output("ff3e::2", 6001, "right"),))
    plan = make_plan([rule], INTERFACES, ["left", "both"])
    assert plan.listens == listens
    assert plan.admitted == {"left": {(group, 5001)}, "both": {(group, 5001)}}
    (key,) = plan.egress_keys()
    assert (key.address, key.ifindex, key.gso_segment_bytes_max) == ("fe80::9", 9, 1452)


def test_a_rule_waits_for_an_address_of_its_own_family() -> None:
    for group, state in (("ff3e::2", "active"), ("239.1.1.2", "waiting: interface right has no IPv4 address")):
        rule = Rule(rule_id="r", input_group="ff3e::1", input_port=5001, outputs=(Output(group, 6001, "right"),))
        assert make_plan([rule], INTERFACES, ["left"]).rules[0].state == state
