"""Sides: where the datagrams of a rule arrive and where they leave. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from relay import bpf
from relay.errors import RuleError

SIDES = ("ingress", "egress", "both")


@dataclass
class Side:
    """What is captured on one interface: pairs of destination address and port."""

    interface: str
    source: str | None = None
    incoming: list[bpf.Input] = field(default_factory=list)
    outgoing: list[bpf.Input] = field(default_factory=list)

    def program(self) -> tuple[bpf.Instruction, ...]:
        """The filter that lets exactly that through."""
        return bpf.assemble_capture(self.incoming, self.outgoing, self.source)

    def describe(self, rule_id: str) -> str:
        """For the file, and for the user."""
        sides = [name for name, pairs in (("ingress", self.incoming), ("egress", self.outgoing)) if pairs]
        return f"{' and '.join(sides)} of rule {rule_id}"


def find(listed: Sequence[dict[str, Any]], rule_id: str) -> dict[str, Any]:
    """The rule of that name among those that `list-rules` tells. Raises RuleError."""
    for rule in listed:
        if rule["rule_id"] == rule_id:
            return rule
    raise RuleError(f"no rule {rule_id}: `mcrctl list-rules` shows those there are")


def sides_of(rule: dict[str, Any], wanted: str) -> list[Side]:
    """The interfaces of a rule, each once: ingress first. `wanted` is one of SIDES.

    Where two legs of it come by one interface from different senders, that interface is there for each.
    """
    sides: dict[tuple[str, str | None], Side] = {}
    if wanted != "egress":
        for group, port, interfaces, source in _inputs(rule):
            for name in interfaces:
                sides.setdefault((name, source), Side(name, source)).incoming.append((group, port))
    if wanted != "ingress":
        of_interface = {side.interface: side for side in reversed(sides.values())}
        for output in rule["outputs"]:
            name = output["interface"]
            if name not in of_interface:
                of_interface[name] = sides[name, None] = Side(name)
            of_interface[name].outgoing.append((output["group"], output["port"]))
    return list(sides.values())


def _inputs(rule: dict[str, Any]) -> Iterator[tuple[str, int, Sequence[str], str | None]]:
    """Group, port, interfaces and source of a rule's input, and of its second leg if it has one."""
    first = (rule["input_group"], rule["input_port"], rule["input_interfaces"], rule["source"])
    yield first
    if rule.get("secondary"):
        second = rule["secondary"]
        interface = second["input_interface"]
        given = (second["input_group"], second["input_port"], [interface] if interface else None, second["source"])
        group, port, interfaces, source = (own or shared for own, shared in zip(given, first, strict=True))
        yield group, port, interfaces, source
