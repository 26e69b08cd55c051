"""What a rule is: values and pure functions on them, no sockets.

The control plane builds rules from requests and configuration, the supervisor opens what they
need, and the data plane sees only the tables compiled from them.
"""

import hashlib
import ipaddress
import re
import socket
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import msgspec

from relay.errors import RuleError

RULE_ID_CHARS_MAX = 64
RULE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]*")
PORT_MAX = 65_535
TTL_MAX = 255
DSCP_MAX = 63  # RFC 2474: six bits
OUTPUTS_OF_A_RULE_MAX = 1024


class Output(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One destination of a rule: an IPv4 `group` (multicast or unicast), `port`, egress `interface`."""

    group: str
    port: int
    interface: str
    ttl: int | Literal["decrement"] | None = None  # None: 1 for multicast, the host's default for unicast
    dscp: int | None = None


class Rule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Datagrams to `input_group`:`input_port` leave once through each output."""

    rule_id: str = ""  # "": named after its content
    input_group: str
    input_port: int
    outputs: tuple[Output, ...]
    input_interface: str | None = None  # None: every interface of the relay
    source: str | None = None  # IPv4 address; None: any
    preserve_source: bool = False


def output_name(output: Output) -> str:
    """`group:port:interface`, as commands and counters write it."""
    return f"{output.group}:{output.port}:{output.interface}"


def describe(rule: Rule) -> str:
    """A rule in a line, for logs."""
    source = f"{rule.source} " if rule.source else ""
    outputs = ", ".join(output_name(output) for output in rule.outputs)
    return f"{source}{rule.input_group}:{rule.input_port} -> {outputs}"


def address_number(address: str) -> int:
    """A valid dotted IPv4 address as a number in host order; ipaddress takes seven times as long."""
    return int.from_bytes(socket.inet_aton(address), "big")


def is_multicast(address: str) -> bool:
    """Whether a valid dotted IPv4 address is in 224.0.0.0/4."""
    return address_number(address) >> 28 == 0xE


def content_id(rule: Rule) -> str:
    """A stable name for a rule that was given none: a hash of everything but its name."""
    content = msgspec.json.encode(msgspec.structs.replace(rule, rule_id=""))
    return "r-" + hashlib.sha256(content).hexdigest()[:12]


def parse_ttl(text: str) -> int | Literal["decrement"]:
    """`decrement`, or 1 to 255. Raises RuleError."""
    if text == "decrement":
        return "decrement"
    if not text.isdecimal() or not 1 <= int(text) <= TTL_MAX:
        raise RuleError(f"ttl {text!r}: give a number from 1 to {TTL_MAX}, or 'decrement'")
    return int(text)


def parse_output(text: str, dscp: int | None = None) -> Output:
    """Read `group:port:interface[:ttl]`. Raises RuleError."""
    parts = text.split(":")
    if len(parts) not in (3, 4) or not all(parts):
        hint = "; IPv6 is not supported yet" if text.startswith("[") or text.count(":") > 4 else ""
        raise RuleError(f"output {text!r}: expected GROUP:PORT:INTERFACE[:TTL]{hint}")
    if not parts[1].isdecimal():
        raise RuleError(f"output {text!r}: port {parts[1]!r} is not a number from 1 to {PORT_MAX}")
    ttl = parse_ttl(parts[3]) if len(parts) == 4 else None
    return Output(parts[0], int(parts[1]), parts[2], ttl, dscp)


def _check_address(what: str, text: str) -> ipaddress.IPv4Address:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise RuleError(f"{what} {text!r} is not an IPv4 address such as 239.1.1.1") from None
    if isinstance(address, ipaddress.IPv6Address):
        raise RuleError(f"{what} {text} is IPv6, which is not supported yet: give an IPv4 address")
    if address == ipaddress.IPv4Address("255.255.255.255") or int(address) >> 24 == 0:
        raise RuleError(f"{what} {text} is neither a multicast group nor a unicast address")
    return address


def _check_port(what: str, port: int) -> None:
    if not 1 <= port <= PORT_MAX:
        raise RuleError(f"{what} {port}: give a port from 1 to {PORT_MAX}")


def _check_output(output: Output) -> None:
    _check_address("output group", output.group)
    _check_port("output port", output.port)
    if isinstance(output.ttl, int) and not 1 <= output.ttl <= TTL_MAX:
        raise RuleError(f"ttl {output.ttl}: give a number from 1 to {TTL_MAX}, or 'decrement'")
    if output.dscp is not None and not 0 <= output.dscp <= DSCP_MAX:
        raise RuleError(f"dscp {output.dscp}: give a number from 0 to {DSCP_MAX}")


def validate(rule: Rule) -> Rule:
    """Check one rule by itself and return it with addresses in their usual form.

    Raises RuleError that names the field and what is allowed.
    """
    if not RULE_ID.fullmatch(rule.rule_id) or len(rule.rule_id) > RULE_ID_CHARS_MAX:
        raise RuleError(
            f"rule id {rule.rule_id!r}: up to {RULE_ID_CHARS_MAX} letters, digits and . _ : @ -, "
            "beginning with a letter or digit"
        )
    _check_address("input group", rule.input_group)
    _check_port("input port", rule.input_port)
    if rule.source is not None and _check_address("source", rule.source).is_multicast:
        raise RuleError(f"source {rule.source} is a multicast group: give a sender's unicast address")
    if not 1 <= len(rule.outputs) <= OUTPUTS_OF_A_RULE_MAX:
        raise RuleError(f"rule {rule.rule_id}: {len(rule.outputs)} outputs; give from 1 to {OUTPUTS_OF_A_RULE_MAX}")
    for output in rule.outputs:
        _check_output(output)
    places = [output_name(output) for output in rule.outputs]
    for place in places:
        if places.count(place) > 1:
            raise RuleError(f"rule {rule.rule_id}: output {place} is given twice: remove one")
    return rule


Graph = Mapping[tuple[str, int], Sequence[Rule]]


def _takes_from(rule: Rule, interface: str, interfaces: Sequence[str]) -> bool:
    if rule.input_interface is None:
        return interface in interfaces
    return rule.input_interface == interface


def _successors(rule: Rule, by_input: Graph, interfaces: Sequence[str]) -> Iterable[Rule]:
    for output in rule.outputs:
        for follower in by_input.get((output.group, output.port), ()):
            if _takes_from(follower, output.interface, interfaces):
                yield follower


def group_by_input(rules: Iterable[Rule]) -> dict[tuple[str, int], list[Rule]]:
    """Rules by their input group and port."""
    by_input = defaultdict(list)
    for rule in rules:
        by_input[rule.input_group, rule.input_port].append(rule)
    return dict(by_input)


def find_cycle(start: Rule, by_input: Graph, interfaces: Sequence[str]) -> list[str]:
    """The ids of a cycle of outputs feeding inputs that leads from `start` back to it, or []."""
    stack = [(start, [start.rule_id])]
    seen: set[str] = set()
    while stack:
        rule, path = stack.pop()
        for follower in _successors(rule, by_input, interfaces):
            if follower.rule_id == start.rule_id:
                return [*path, start.rule_id]
            if follower.rule_id not in seen:
                seen.add(follower.rule_id)
                stack.append((follower, [*path, follower.rule_id]))
    return []


def check_cycles(added: Iterable[Rule], rules: Mapping[str, Rule], interfaces: Sequence[str]) -> None:
    """Refuse `added` when they close a cycle among `rules`, which hold them already. Raises RuleError.

    `interfaces` are the relay's own, on which a rule without an input interface listens.
    """
    by_input = group_by_input(rules.values())
    for rule in added:
        cycle = find_cycle(rule, by_input, interfaces)
        if len(cycle) == 2:
            raise RuleError(
                f"rule {rule.rule_id}: an output equals its input on the same interface, a loop: "
                "choose another group, port or interface"
            )
        if cycle:
            raise RuleError(f"cycle through rules {' -> '.join(cycle)}: change an output of one of them")


def chain_warnings(added: Sequence[Rule], rules: Mapping[str, Rule], interfaces: Sequence[str]) -> list[str]:
    """Outputs that feed another rule of this relay, where one of both is in `added`.

    They are legal, but what leaves here is never taken in again.
    """
    by_input = group_by_input(rules.values())
    by_output: dict[tuple[str, int], list[Rule]] = defaultdict(list)
    for rule in rules.values():
        for output in rule.outputs:
            by_output[output.group, output.port].append(rule)
    ids = {rule.rule_id for rule in added}
    senders = {rule.rule_id: rule for rule in added}
    for rule in added:
        senders |= {sender.rule_id: sender for sender in by_output[rule.input_group, rule.input_port]}
    return [
        f"rule {sender.rule_id} sends what rule {follower.rule_id} listens to: "
        "the relay never takes in what it sent itself"
        for sender in senders.values()
        for follower in _successors(sender, by_input, interfaces)
        if sender.rule_id in ids or follower.rule_id in ids
    ]


def named(rule: Rule) -> Rule:
    """The rule itself, or with its content's hash for a name when it has none."""
    return rule if rule.rule_id else msgspec.structs.replace(rule, rule_id=content_id(rule))


def merge(
    active: Mapping[str, Rule], wanted: Iterable[Rule], replace: bool
) -> tuple[tuple[Rule, ...], tuple[str, ...]]:
    """What must be added, and which ids removed before, so that `wanted` are active.

    Rules that are active already are left out. Raises RuleError for an id with other content, unless
    `replace`, and for an id that stands twice in `wanted`.
    """
    add: dict[str, Rule] = {}
    remove: list[str] = []
    seen: set[str] = set()
    for rule in wanted:
        if rule.rule_id in seen:
            raise RuleError(f"rule id {rule.rule_id} is given twice: choose another for one of them")
        seen.add(rule.rule_id)
        former = active.get(rule.rule_id)
        if former == rule:
            continue
        if former is not None:
            if not replace:
                raise RuleError(
                    f"rule {rule.rule_id} exists with other content: use --replace to change it, or choose another id"
                )
            remove.append(rule.rule_id)
        add[rule.rule_id] = rule
    return tuple(add.values()), tuple(remove)
