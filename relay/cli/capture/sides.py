"""Sides: where the datagrams of a rule arrive and where they leave. Pure."""

from collections.abc import Sequence
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
    """The interfaces of a rule, each once: ingress first. `wanted` is one of SIDES."""
    sides: dict[str, Side] = {}
    if wanted != "egress":
        for name in rule["input_interfaces"]:
            side = sides.setdefault(name, Side(name, rule["source"] or None))
            side.incoming.append((rule["input_group"], rule["input_port"]))
    if wanted != "ingress":
        for output in rule["outputs"]:
            side = sides.setdefault(output["interface"], Side(output["interface"]))
            side.outgoing.append((output["group"], output["port"]))
    return list(sides.values())
