"""What a rule is: values and pure functions on them, no sockets.

The control plane builds rules from requests and configuration, the supervisor opens what they
need, and the data plane sees only the tables compiled from them.
"""

import hashlib
import ipaddress
import re
import socket
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta

from relay.errors import RuleError

RULE_ID_CHARS_MAX = 64
RULE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]*")
PORT_MAX = 65_535
TTL_MAX = 255
DSCP_MAX = 63  # RFC 2474: six bits
OUTPUTS_OF_A_RULE_MAX = 1024
STALL_MS_MIN, STALL_MS_MAX = 10, 3_600_000
MAX_PPS_MIN, MAX_PPS_MAX = 1, 10**8  # more than a relay can
MAX_BPS_MIN, MAX_BPS_MAX = 1000, 10**12
LATER_FIELDS = ("stall_ms", "max_pps", "max_bps", "secondary", "protection")  # came after rules were named by content
RULES_MAX = 16_384  # both as relay/dataplane/layout.py has them; this module must not load numpy
OUTPUTS_MAX = 32_768
INTERFACE = re.compile(r"[^\s/:\x00-\x1f\x7f]{1,15}")  # IFNAMSIZ less the end, dev_valid_name() in net/core/dev.c
TEXT_CHARS_MAX = 256  # of any field as it arrives; `validate` says what is really allowed
WARNINGS_MAX = 100  # of one kind, for one change
CYCLE_SHOWN_MAX = 10
CHAIN_PAIRS_MAX = 100_000  # looked at for warnings: thousands of rules may all feed thousands of others

Text = Annotated[str, Meta(max_length=TEXT_CHARS_MAX)]


class Output(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One destination of a rule: an IPv4 `group` (multicast or unicast), `port`, egress `interface`."""

    group: Text
    port: int
    interface: Text
    ttl: int | Literal["decrement"] | None = None  # None: 1 for multicast, the host's default for unicast
    dscp: int | None = None


class Secondary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a protected rule's second leg comes in; a field that is None is as the rule's own."""

    input_group: Text | None = None
    input_port: int | None = None
    input_interface: Text | None = None
    source: Text | None = None


Protection = Literal["seamless", "failover"]


class Rule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Datagrams to `input_group`:`input_port` leave once through each output."""

    rule_id: Text = ""  # "": named after its content
    input_group: Text
    input_port: int
    outputs: Annotated[tuple[Output, ...], Meta(max_length=OUTPUTS_OF_A_RULE_MAX)]
    input_interface: Text | None = None  # None: every interface of the relay
    source: Text | None = None  # IPv4 address; None: any
    preserve_source: bool = False
    stall_ms: int | None = None  # a sender that is silent for longer is told of; None: no one is
    max_pps: int | None = None  # datagrams a second that may come; what is over is dropped. None: any number
    max_bps: int | None = None  # likewise, bits of their payload
    secondary: Secondary | None = None  # the other of two legs that carry the same
    protection: Protection | None = None  # how the two become one; with `secondary` alone


class Leg(NamedTuple):
    """One input of a rule: a group or address, a port, and None for any interface of the relay, any source."""

    group: str
    port: int
    interface: str | None
    source: str | None

    def __str__(self) -> str:
        source = f"{self.source} " if self.source else ""
        return f"{source}{self.group}:{self.port}{f' on {self.interface}' if self.interface else ''}"


def legs(rule: Rule) -> tuple[Leg, ...]:
    """A rule's input, and behind it that of its second leg if it has one."""
    first = Leg(rule.input_group, rule.input_port, rule.input_interface, rule.source)
    second = rule.secondary
    if second is None:
        return (first,)
    return first, Leg(
        second.input_group or first.group,
        first.port if second.input_port is None else second.input_port,
        second.input_interface or first.interface,
        second.source or first.source,
    )


def meet(one: Leg, other: Leg) -> bool:
    """Whether a datagram may belong to both."""
    interfaces, sources = {one.interface, other.interface}, {one.source, other.source}
    return (
        (one.group, one.port) == (other.group, other.port)
        and (None in interfaces or len(interfaces) == 1)
        and (None in sources or len(sources) == 1)
    )


def output_name(output: Output) -> str:
    """`group:port:interface`, as commands and counters write it."""
    return f"{output.group}:{output.port}:{output.interface}"


def describe(rule: Rule) -> str:
    """A rule in a line, for logs."""
    source = f"{rule.source} " if rule.source else ""
    outputs = ", ".join(output_name(output) for output in rule.outputs)
    second = f" and {legs(rule)[1]}, {rule.protection}" if rule.secondary else ""
    limits = f", at most {limits_of(rule)}" if limits_of(rule) else ""
    return f"{source}{rule.input_group}:{rule.input_port}{second} -> {outputs}{limits}"


def limits_of(rule: Rule) -> str:
    """What a rule lets pass at most, in words; "" without a limit."""
    limits = ((rule.max_pps, "packets/s"), (rule.max_bps, "bit/s"))
    return " and ".join(f"{limit} {unit}" for limit, unit in limits if limit is not None)


def address_number(address: str) -> int:
    """A valid dotted IPv4 address as a number in host order; ipaddress takes seven times as long."""
    return int.from_bytes(socket.inet_aton(address), "big")


def is_multicast(address: str) -> bool:
    """Whether a valid dotted IPv4 address is in 224.0.0.0/4."""
    return address_number(address) >> 28 == 0xE


def content_id(rule: Rule) -> str:
    """A stable name for a rule that was given none: a hash of everything but its name."""
    content = msgspec.to_builtins(msgspec.structs.replace(rule, rule_id=""))
    for name in LATER_FIELDS:  # names stay what they were before there was such a field
        if content[name] is None:
            del content[name]
    return "r-" + hashlib.sha256(msgspec.json.encode(content)).hexdigest()[:12]


def parse_ttl(text: str) -> int | Literal["decrement"]:
    """`decrement`, or 1 to 255. Raises RuleError."""
    if text == "decrement":
        return "decrement"
    if not text.isdecimal() or not 1 <= int(text) <= TTL_MAX:
        raise RuleError(f"ttl {text!r}: give a number from 1 to {TTL_MAX}, or 'decrement'")
    return int(text)


Ttl = int | Literal["decrement"] | None
SECONDARY = re.compile(r"(?:\[(?P<ip>[^\]]*)\]|(?P<group>[^:]*))(?::(?P<port>[^:]*))?(?::(?P<interface>[^:]*))?")


def split_secondary(text: str) -> tuple[str | None, str | None, str | None]:
    """Group, port and interface of `group:port[:interface]`, None for what is left out. Raises RuleError."""
    match = SECONDARY.fullmatch(text)
    if match is None or not text.strip(":"):
        raise RuleError(f"secondary {text!r}: expected GROUP:PORT[:INTERFACE], such as 239.1.2.1:5001:eth1 or ::eth1")
    return match["ip"] or match["group"] or None, match["port"] or None, match["interface"] or None


def split_output(text: str) -> tuple[str, str, str, Ttl]:
    """Group, port, interface and TTL of `group:port:interface[:ttl]`. Raises RuleError."""
    parts = text.split(":")
    if len(parts) not in (3, 4) or not all(parts):
        hint = "; IPv6 is not supported yet" if text.startswith("[") or text.count(":") > 4 else ""
        raise RuleError(f"output {text!r}: expected GROUP:PORT:INTERFACE[:TTL]{hint}")
    return parts[0], parts[1], parts[2], parse_ttl(parts[3]) if len(parts) == 4 else None


def parse_output(text: str, dscp: int | None = None) -> Output:
    """Read `group:port:interface[:ttl]`. Raises RuleError."""
    group, port, interface, ttl = split_output(text)
    if not port.isdecimal():
        raise RuleError(f"output {text!r}: port {port!r} is not a number from 1 to {PORT_MAX}")
    return Output(group, int(port), interface, ttl, dscp)


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


def _check_interface(what: str, name: str) -> None:
    if not INTERFACE.fullmatch(name) or name in (".", ".."):
        raise RuleError(f"{what} {name!r}: give an interface's name, up to 15 characters without space, / or :")


def _check_ttl(ttl: Ttl) -> None:
    if isinstance(ttl, int) and not 1 <= ttl <= TTL_MAX:
        raise RuleError(f"ttl {ttl}: give a number from 1 to {TTL_MAX}, or 'decrement'")


def _check_dscp(dscp: int | None) -> None:
    if dscp is not None and not 0 <= dscp <= DSCP_MAX:
        raise RuleError(f"dscp {dscp}: give a number from 0 to {DSCP_MAX}")


def _check_id(rule_id: str) -> None:
    if not RULE_ID.fullmatch(rule_id) or len(rule_id) > RULE_ID_CHARS_MAX:
        raise RuleError(
            f"rule id {rule_id!r}: up to {RULE_ID_CHARS_MAX} letters, digits and . _ : @ -, "
            "beginning with a letter or digit"
        )


def _check_source(source: str) -> None:
    if _check_address("source", source).is_multicast:
        raise RuleError(f"source {source} is a multicast group: give a sender's unicast address")


def _check_stall(stall_ms: int | None) -> None:
    if stall_ms is not None and not STALL_MS_MIN <= stall_ms <= STALL_MS_MAX:
        raise RuleError(f"stall_ms {stall_ms}: give from {STALL_MS_MIN} to {STALL_MS_MAX}")


def _check_limits(name: str, limit: int | None, least: int, most: int) -> None:
    if limit is not None and not least <= limit <= most:
        raise RuleError(f"{name} {limit}: give from {least} to {most}, or leave it out for no limit")


def _check_protection(rule: Rule) -> None:
    about = f"rule {rule.rule_id}: "
    if rule.secondary is None:
        if rule.protection is not None:
            raise RuleError(f"{about}protection {rule.protection} needs a secondary input")
        return
    if rule.protection is None:
        raise RuleError(f"{about}a secondary input needs protection: seamless for RTP, failover for any datagrams")
    if rule.protection == "failover" and rule.stall_ms is None:
        raise RuleError(f"{about}failover needs stall_ms: after how much silence the secondary input takes over")
    first, second = legs(rule)
    if first == second:
        raise RuleError(f"{about}the secondary input is the primary: give another group, port, interface or source")
    if meet(first, second):
        raise RuleError(
            f"{about}a datagram may be of both inputs, {first} and {second}: name an interface or a source for each"
        )


def _check_outputs(rule: Rule) -> None:
    if not 1 <= len(rule.outputs) <= OUTPUTS_OF_A_RULE_MAX:
        raise RuleError(f"rule {rule.rule_id}: {len(rule.outputs)} outputs; give from 1 to {OUTPUTS_OF_A_RULE_MAX}")
    places: set[str] = set()
    for place in map(output_name, rule.outputs):
        if place in places:
            raise RuleError(f"rule {rule.rule_id}: output {place} is given twice: remove one")
        places.add(place)


KeyPath = tuple[str | int, ...]  # of a value in a rule, such as ("outputs", 2, "port")
Check = tuple[KeyPath, Callable[..., object], tuple[object, ...]]  # where, what raises RuleError, its arguments


def _checks(rule: Rule) -> Iterator[Check]:
    yield ("rule_id",), _check_id, (rule.rule_id,)
    yield ("input_group",), _check_address, ("input group", rule.input_group)
    yield ("input_port",), _check_port, ("input port", rule.input_port)
    if rule.input_interface is not None:
        yield ("input_interface",), _check_interface, ("input interface", rule.input_interface)
    if rule.source is not None:
        yield ("source",), _check_source, (rule.source,)
    yield ("stall_ms",), _check_stall, (rule.stall_ms,)
    yield ("max_pps",), _check_limits, ("max_pps", rule.max_pps, MAX_PPS_MIN, MAX_PPS_MAX)
    yield ("max_bps",), _check_limits, ("max_bps", rule.max_bps, MAX_BPS_MIN, MAX_BPS_MAX)
    second = rule.secondary
    if second is not None:
        if second.input_group is not None:
            yield ("secondary", "input_group"), _check_address, ("secondary input group", second.input_group)
        if second.input_port is not None:
            yield ("secondary", "input_port"), _check_port, ("secondary input port", second.input_port)
        if second.input_interface is not None:
            what = "secondary input interface"
            yield ("secondary", "input_interface"), _check_interface, (what, second.input_interface)
        if second.source is not None:
            yield ("secondary", "source"), _check_source, (second.source,)
    yield ("protection",), _check_protection, (rule,)
    for index, output in enumerate(rule.outputs):
        yield ("outputs", index, "interface"), _check_interface, ("output interface", output.interface)
        yield ("outputs", index, "group"), _check_address, ("output group", output.group)
        yield ("outputs", index, "port"), _check_port, ("output port", output.port)
        yield ("outputs", index, "ttl"), _check_ttl, (output.ttl,)
        yield ("outputs", index, "dscp"), _check_dscp, (output.dscp,)
    yield ("outputs",), _check_outputs, (rule,)


def validate(rule: Rule) -> Rule:
    """Check one rule by itself and return it.

    Raises RuleError that names the field and what is allowed.
    """
    for _, check, arguments in _checks(rule):
        check(*arguments)
    return rule


def faults(rule: Rule) -> Iterator[tuple[KeyPath, str]]:
    """All that `validate` could refuse in a rule, not the first alone: where, and why."""
    for path, check, arguments in _checks(rule):
        try:
            check(*arguments)
        except RuleError as error:
            yield path, str(error)


def check_room(rules: Iterable[Rule]) -> None:
    """Raises RuleError when these are more than a relay holds."""
    sizes = [len(rule.outputs) for rule in rules]
    if len(sizes) > RULES_MAX or sum(sizes) > OUTPUTS_MAX:
        raise RuleError(
            f"{len(sizes)} rules with {sum(sizes)} outputs are over the limits of "
            f"{RULES_MAX} rules and {OUTPUTS_MAX} outputs"
        )


Graph = Mapping[tuple[str, int], Sequence[Rule]]


Place = tuple[str, int, str]  # group, port, interface: where an output may feed an input


def _takes_from(rule: Rule, place: Place, interfaces: Sequence[str]) -> bool:
    group, port, interface = place
    return any(
        (leg.group, leg.port) == (group, port)
        and (interface in interfaces if leg.interface is None else leg.interface == interface)
        for leg in legs(rule)
    )


def _successors(rule: Rule, by_input: Graph, interfaces: Sequence[str]) -> Iterable[Rule]:
    for place in _places(rule):
        yield from _fed(place, by_input, interfaces)


def group_by_input(rules: Iterable[Rule]) -> dict[tuple[str, int], list[Rule]]:
    """Rules by the group and port of their inputs."""
    by_input = defaultdict(list)
    for rule in rules:
        for place in dict.fromkeys((leg.group, leg.port) for leg in legs(rule)):
            by_input[place].append(rule)
    return dict(by_input)


def check_protected(rules: Iterable[Rule], interfaces: Sequence[str]) -> None:
    """Refuse rules with a second leg of which two would share an input: a datagram has one state. Raises RuleError.

    `interfaces` are the relay's own, on which a rule without an input interface listens.
    """
    seen: dict[Place, list[tuple[Rule, Leg]]] = defaultdict(list)
    for rule in rules:
        for leg in legs(rule) if rule.secondary is not None else ():
            for interface in (leg.interface,) if leg.interface else interfaces:
                here = leg._replace(interface=interface)
                sharing = seen[leg.group, leg.port, interface]
                for other, others in sharing:
                    if other is not rule and meet(here, others):
                        raise RuleError(
                            f"rules {other.rule_id} and {rule.rule_id} both protect {here}: "
                            "let one rule have the outputs of both, or remove one"
                        )
                sharing.append((rule, here))


def find_cycle(added: Iterable[Rule], by_input: Graph, interfaces: Sequence[str]) -> list[str]:
    """The ids of a cycle of outputs feeding inputs that can be reached from `added`, its first again at the end, or [].

    Depth first, each rule and each place entered once, as thousands of rules may share an input.
    """
    is_open: dict[str | Place, bool] = {}
    for start in added:
        if start.rule_id in is_open:
            continue
        path: list[str | Place] = [start.rule_id]
        is_open[start.rule_id] = True
        stack: list[Iterator[Rule | Place]] = [_places(start)]
        while stack:
            entered = next(stack[-1], None)
            if entered is None:
                stack.pop()
                is_open[path.pop()] = False
                continue
            node = entered.rule_id if isinstance(entered, Rule) else entered
            if is_open.get(node):
                ids = [passed for passed in path[path.index(node) :] if isinstance(passed, str)]
                return [*ids, ids[0]]
            if node not in is_open:
                is_open[node] = True
                path.append(node)
                stack.append(_places(entered) if isinstance(entered, Rule) else _fed(entered, by_input, interfaces))
    return []


def _places(rule: Rule) -> Iterator[Place]:
    return ((output.group, output.port, output.interface) for output in rule.outputs)


def _fed(place: Place, by_input: Graph, interfaces: Sequence[str]) -> Iterator[Rule]:
    group, port, _ = place
    return (rule for rule in by_input.get((group, port), ()) if _takes_from(rule, place, interfaces))


def check_cycles(added: Iterable[Rule], rules: Mapping[str, Rule], interfaces: Sequence[str]) -> None:
    """Refuse `added` when they close a cycle among `rules`, which hold them already. Raises RuleError.

    `interfaces` are the relay's own, on which a rule without an input interface listens.
    """
    cycle = find_cycle(added, group_by_input(rules.values()), interfaces)
    if len(cycle) == 2:
        raise RuleError(
            f"rule {cycle[0]}: an output equals its input on the same interface, a loop: "
            "choose another group, port or interface"
        )
    if cycle:
        raise RuleError(f"cycle through rules {_shortened(cycle)}: change an output of one of them")


def _shortened(cycle: Sequence[str]) -> str:
    """A cycle's rules in order, the middle of a long one left out."""
    shown = list(cycle) if len(cycle) <= CYCLE_SHOWN_MAX else [*cycle[: CYCLE_SHOWN_MAX - 2], "…", cycle[-1]]
    return " -> ".join(shown)


def chain_warnings(added: Sequence[Rule], rules: Mapping[str, Rule], interfaces: Sequence[str]) -> list[str]:
    """Outputs that feed another rule of this relay, where one of both is in `added`.

    They are legal, but what leaves here is never taken in again. WARNINGS_MAX of them are enough to read.
    """
    by_input = group_by_input(rules.values())
    by_output: dict[tuple[str, int], list[Rule]] = defaultdict(list)
    for rule in rules.values():
        for output in rule.outputs:
            by_output[output.group, output.port].append(rule)
    ids = {rule.rule_id for rule in added}
    senders = {rule.rule_id: rule for rule in added}
    for place in {(leg.group, leg.port) for rule in added for leg in legs(rule)}:
        senders |= {sender.rule_id: sender for sender in by_output[place]}
    pairs = (
        (sender.rule_id, follower.rule_id)
        for sender in senders.values()
        for follower in _successors(sender, by_input, interfaces)
    )
    warnings = (
        f"rule {sender} sends what rule {follower} listens to: the relay never takes in what it sent itself"
        for sender, follower in islice(pairs, CHAIN_PAIRS_MAX)
        if sender in ids or follower in ids
    )
    return list(islice(warnings, WARNINGS_MAX))


def fingerprint(rules: Iterable[Rule]) -> str:
    """A hash of a set of rules, whatever their order."""
    content = msgspec.json.encode(sorted(rules, key=lambda rule: rule.rule_id))
    return hashlib.sha256(content).hexdigest()


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
