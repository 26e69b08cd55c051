"""Which rules take a datagram, and which one nearly does. Pure."""

from collections.abc import Sequence

from relay.cli.explaining.facts import Datagram, Facts, Step
from relay.rules import Leg
from relay.supervisor.plan import PlannedRule

DIFFERENCES_SHOWN_MAX = 2  # a rule that differs in more is no near one


def matching(rules: Sequence[PlannedRule], datagram: Datagram) -> list[PlannedRule]:
    """The rules that take this datagram, as relay/dataplane/match.py finds them."""
    return [planned for planned in rules if not differences(planned, datagram)]


def taking(planned: PlannedRule, datagram: Datagram) -> int:
    """Which leg of a rule that takes this datagram it comes by: 0 for the primary."""
    takes = [not _of_leg(leg, interfaces, datagram) for leg, interfaces in planned.inputs]
    return takes.index(True)


def differences(planned: PlannedRule, datagram: Datagram) -> list[str]:
    """In which fields a rule asks for something else, or that leg of it which asks for the nearest."""
    return min((_of_leg(leg, interfaces, datagram) for leg, interfaces in planned.inputs), key=len)


def _of_leg(leg: Leg, interfaces: Sequence[str], datagram: Datagram) -> list[str]:
    different = []
    if leg.group != datagram.group:
        different.append(f"group: it takes {leg.group}")
    if leg.port != datagram.port:
        different.append(f"port: it takes {leg.port}")
    if leg.source not in (None, datagram.source):
        different.append(f"source: it takes only {leg.source}")
    if datagram.interface not in interfaces:
        different.append(f"interface: it takes from {leg.interface or ', '.join(interfaces) or 'none'}")
    return different


def nearest(rules: Sequence[PlannedRule], datagram: Datagram) -> PlannedRule | None:
    """The rule that differs in the fewest fields, of those the one of the same group or the closest port."""

    def distance(planned: PlannedRule) -> tuple[int, bool, int]:
        rule = planned.rule
        port = abs(rule.input_port - datagram.port)
        return len(differences(planned, datagram)), rule.input_group != datagram.group, port

    near = min(rules, key=distance, default=None)
    return near if near is not None and len(differences(near, datagram)) <= DIFFERENCES_SHOWN_MAX else None


def no_rule(facts: Facts, datagram: Datagram, is_admitted: bool) -> Step:
    """Where no rule takes it: the nearest one. What the filter admits all the same is counted."""
    what = "no rule takes it, so it is counted as no_match" if is_admitted else "no rule takes it"
    near = nearest(facts.plan.rules, datagram)
    if near is None:
        kept = f"none of {len(facts.plan.rules)} rules is near" if facts.plan.rules else "there are no rules"
        inputs = f"--input-group {datagram.group} --input-port {datagram.port}"
        return Step("rule", "stop", f"{what}; {kept}", f"mcrctl add-rule {inputs} --output GROUP:PORT:INTERFACE")
    reason = f"{what}; the nearest is {near.rule.rule_id}, which differs in {'; '.join(differences(near, datagram))}"
    change = f"mcrctl add-rule --replace --rule-id {near.rule.rule_id} … with the input that is meant"
    return Step("rule", "stop", reason, f"{change}, or add another rule")
