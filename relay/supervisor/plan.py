"""The plan: from rules and the host's interfaces to what must be open, joined and admitted. Pure.

The supervisor compares a plan with what is open and changes only the difference.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from relay.addresses import is_ipv6, is_multicast
from relay.dataplane.layout import RINGS_MAX
from relay.errors import RuleError
from relay.rules import Output, Rule, check_room
from relay.sockaddr import is_of_link
from relay.supervisor.egress import EgressKey, egress_key
from relay.supervisor.interfaces import Interface
from relay.supervisor.membership import Listen


@dataclass(frozen=True)
class PlannedOutput:
    """An output with the socket it leaves through, or without one and the reason."""

    output: Output
    key: EgressKey | None
    fault: str | None


@dataclass(frozen=True)
class PlannedRule:
    """A rule with the existing interfaces it listens on, and why it waits if it does."""

    rule: Rule
    interfaces: tuple[str, ...]
    outputs: tuple[PlannedOutput, ...]
    fault: str | None

    @property
    def state(self) -> str:
        """`active`, or `waiting: <why>`."""
        faults = [self.fault] if self.fault else [output.fault for output in self.outputs if output.fault]
        return f"waiting: {faults[0]}" if faults else "active"


@dataclass
class Plan:
    """Everything that rules need of the host."""

    rules: list[PlannedRule] = field(default_factory=list)
    rings: dict[str, int] = field(default_factory=dict)  # interface name → ifindex
    listens: set[Listen] = field(default_factory=set)
    admitted: dict[str, set[tuple[str, int]]] = field(default_factory=dict)  # by interface name

    def refuse(self, refused: Mapping[EgressKey, str]) -> None:
        """Let the outputs wait whose socket the kernel refused, with its reason."""
        self.rules = [
            replace(rule, outputs=tuple(_refuse_output(output, refused) for output in rule.outputs))
            for rule in self.rules
        ]

    def egress_keys(self) -> set[EgressKey]:
        """The egress sockets that must be open."""
        return {output.key for rule in self.rules for output in rule.outputs if output.key is not None}


def _refuse_output(output: PlannedOutput, refused: Mapping[EgressKey, str]) -> PlannedOutput:
    if output.key is None or output.key not in refused:
        return output
    return replace(output, key=None, fault=refused[output.key])


def _plan_output(rule: Rule, output: Output, interfaces: Mapping[str, Interface]) -> PlannedOutput:
    interface = interfaces.get(output.interface)
    if interface is None:
        return PlannedOutput(output, None, f"interface {output.interface} does not exist")
    fault = interface.fault(is_ipv6(output.group))
    if fault is not None:
        return PlannedOutput(output, None, fault)
    ttl = output.ttl if isinstance(output.ttl, int) else None
    key = egress_key(output.group, output.port, interface, ttl, output.dscp, rule.preserve_source)
    return PlannedOutput(output, key, None)


def make_plan(rules: Iterable[Rule], interfaces: Mapping[str, Interface], default_interfaces: Sequence[str]) -> Plan:
    """Plan for `rules`. Raises RuleError when they are more than a relay holds."""
    rules = tuple(rules)
    check_room(rules)
    plan = Plan()
    names = dict.fromkeys(default_interfaces)  # in order; thousands of rules may each name another
    for rule in rules:
        wanted = (rule.input_interface,) if rule.input_interface else tuple(default_interfaces)
        names |= dict.fromkeys(wanted)
        existing = tuple(name for name in wanted if name in interfaces)
        faults = [f"interface {name} does not exist" for name in wanted if name not in interfaces]
        faults += [fault for name in existing if (fault := interfaces[name].fault(is_ipv6(rule.input_group)))]
        planned = tuple(_plan_output(rule, output, interfaces) for output in rule.outputs)
        plan.rules.append(PlannedRule(rule, existing, planned, faults[0] if faults else None))
        _plan_input(plan, rule, existing, interfaces)
    if len(names) > RINGS_MAX:
        raise RuleError(f"{len(names)} input interfaces are over the limit of {RINGS_MAX}")
    plan.rings = {name: interfaces[name].index for name in names if name in interfaces}
    for name in plan.rings:
        plan.admitted.setdefault(name, set())
    return plan


def _plan_input(plan: Plan, rule: Rule, existing: Sequence[str], interfaces: Mapping[str, Interface]) -> None:
    multicast = is_multicast(rule.input_group)
    for name in existing:
        plan.admitted.setdefault(name, set()).add((rule.input_group, rule.input_port))
        if multicast:
            plan.listens.add(Listen(rule.input_group, 0, interfaces[name].index, rule.source))
    if not multicast:
        plan.listens |= _held(rule, existing, interfaces)


def _held(rule: Rule, existing: Sequence[str], interfaces: Mapping[str, Interface]) -> set[Listen]:
    """A unicast input, which is held once for all interfaces, unless it exists once a link."""
    indexes = [interfaces[name].index for name in existing] if is_of_link(rule.input_group) else [0]
    return {Listen(rule.input_group, rule.input_port, index, None) for index in indexes}
