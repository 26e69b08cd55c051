"""The plan: from rules and the host's interfaces to what must be open, joined and admitted. Pure.

The supervisor compares a plan with what is open and changes only the difference.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from relay.addresses import is_ipv6, is_multicast
from relay.dataplane.layout import PROTECTIONS_MAX, RINGS_MAX
from relay.errors import RuleError
from relay.rules import Leg, Output, Rule, check_room, legs
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
    secondary_interfaces: tuple[str, ...] = ()  # of its second leg, if it has one

    @property
    def inputs(self) -> tuple[tuple[Leg, tuple[str, ...]], ...]:
        """Each leg, with the existing interfaces that it comes in by."""
        return tuple(zip(legs(self.rule), (self.interfaces, self.secondary_interfaces), strict=False))

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
    protected: dict[str, set[tuple[str, int]]] = field(default_factory=dict)  # of those, what one worker must read

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
        existing: list[tuple[str, ...]] = []
        faults: list[str | None] = []
        for leg in legs(rule):
            wanted = (leg.interface,) if leg.interface else tuple(default_interfaces)
            names |= dict.fromkeys(wanted)
            existing.append(tuple(name for name in wanted if name in interfaces))
            missing = [f"interface {name} does not exist" for name in wanted if name not in interfaces]
            missing += [fault for name in existing[-1] if (fault := interfaces[name].fault(is_ipv6(leg.group)))]
            faults.append(missing[0] if missing else None)
            _plan_input(plan, leg, existing[-1], interfaces, rule.secondary is not None)
        planned = tuple(_plan_output(rule, output, interfaces) for output in rule.outputs)
        fault = faults[0] if all(faults) else None  # while one leg is there, the rule works
        plan.rules.append(PlannedRule(rule, existing[0], planned, fault, *existing[1:]))
    if len(names) + len(plan.protected) > RINGS_MAX:
        more = f", {len(plan.protected)} of them with protected inputs, which count twice," if plan.protected else ""
        raise RuleError(f"{len(names)} input interfaces{more} are over the limit of {RINGS_MAX}")
    if (count := sum(rule.secondary is not None for rule in rules)) > PROTECTIONS_MAX:
        raise RuleError(f"{count} rules with a secondary input are over the limit of {PROTECTIONS_MAX}")
    plan.rings = {name: interfaces[name].index for name in names if name in interfaces}
    for name in plan.rings:
        plan.admitted.setdefault(name, set())
    return plan


def _plan_input(
    plan: Plan, leg: Leg, existing: Sequence[str], interfaces: Mapping[str, Interface], is_protected: bool
) -> None:
    multicast = is_multicast(leg.group)
    place = leg.group, leg.port
    for name in existing:
        plan.admitted.setdefault(name, set()).add(place)
        if is_protected:
            plan.protected.setdefault(name, set()).add(place)
        if multicast:
            plan.listens.add(Listen(leg.group, 0, interfaces[name].index, leg.source))
    if not multicast:
        plan.listens |= _held(leg, existing, interfaces)


def _held(leg: Leg, existing: Sequence[str], interfaces: Mapping[str, Interface]) -> set[Listen]:
    """A unicast input, which is held once for all interfaces, unless it exists once a link."""
    indexes = [interfaces[name].index for name in existing] if is_of_link(leg.group) else [0]
    return {Listen(leg.group, leg.port, index, None) for index in indexes}
