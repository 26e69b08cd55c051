"""Rules as an operator writes them: one entry stands for many where it has a range. Pure.

    rule_id = "cam-{group}-{port}"
    input_group = "239.1.1.0/24"                # or "239.1.1.10-239.1.1.20"
    input_port = "5000-5003"
    outputs = ["239.2.{g3}.{g4}:{port+1000}:eth1"]

`expand` makes plain rules of an entry, which is all that the relay knows: group after group, and for each group port
after port. A range in an output is as long as the input's, and the two are gone through together.
"""

import ipaddress
import re
import socket
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from relay.errors import RuleError
from relay.rules import (
    OUTPUTS_OF_A_RULE_MAX,
    PORT_MAX,
    KeyPath,
    Output,
    Protection,
    Rule,
    Secondary,
    Text,
    Ttl,
    faults,
    named,
    output_name,
    split_output,
)

RULES_OF_A_RANGE_MAX = 10_000
FIELD = re.compile(r"\{([^{}]*)\}")
NUMBER = re.compile(r"(n|port|g[1-4])([+-]\d{1,5})?")
FIELDS_HELP = "{group}, {port}, {n}, {g1} to {g4}, and numbers more or less such as {port+1000}"

UNKNOWN = 0xEF000001  # 239.0.0.1, in place of an address that is wrong

Fault = tuple[KeyPath, str]


def _about(text: str) -> Meta:
    return Meta(description=text)


class ConfiguredOutput(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One destination of a rule: a table, or the same as `"GROUP:PORT:INTERFACE[:TTL]"`."""

    group: Annotated[Text, _about("IPv4 address, multicast or unicast. A range or fields: see Ranges.")]
    port: Annotated[int | Text, _about("UDP port, 1 to 65535. A range or fields in quotes.")]
    interface: Annotated[Text, _about("Interface that it leaves by.")]
    ttl: Annotated[
        Ttl, _about('1 to 255, or `"decrement"` for the incoming TTL less 1. None: 1 for multicast, else the host\'s.')
    ] = None
    dscp: Annotated[int | None, _about("Differentiated services code point, 0 to 63 (RFC 2474). None: 0.")] = None


class ConfiguredSecondary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The second leg of a rule: at least one key other than the rule's own."""

    input_group: Annotated[
        Text | None, _about("Group or address. A range or fields: see Ranges. None: the rule's.")
    ] = None
    input_port: Annotated[int | Text | None, _about("UDP port. A range or fields in quotes. None: the rule's.")] = None
    input_interface: Annotated[Text | None, _about("Where it comes in. None: as the rule.")] = None
    source: Annotated[Text | None, _about("Its sender, an IPv4 address. None: as the rule.")] = None


class ConfiguredRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An entry of `[[rules]]`: datagrams to the input leave once through each output."""

    rule_id: Annotated[
        Text,
        _about("Name: up to 64 letters, digits and `. _ : @ -`. Empty: a hash of the rule. With a range: with fields."),
    ] = ""
    input_group: Annotated[Text, _about("Multicast group, or a unicast address of this host. Or a range of them.")]
    input_port: Annotated[int | Text, _about('UDP port, 1 to 65535. Or a range such as `"5000-5099"`.')]
    outputs: Annotated[
        tuple[ConfiguredOutput | str, ...],
        Meta(max_length=OUTPUTS_OF_A_RULE_MAX, description="1 to 1024 destinations, each a text or a table."),
    ]
    input_interface: Annotated[Text | None, _about("Only what comes in here. None: all `interfaces`.")] = None
    source: Annotated[Text | None, _about("Only datagrams of this sender, an IPv4 address. None: of any.")] = None
    preserve_source: Annotated[bool, _about("Send from the original source address.")] = False
    stall_ms: Annotated[int | None, _about("Tell when a sender is silent for longer, 10 to 3600000. None: never.")] = (
        None
    )
    max_pps: Annotated[
        int | None, _about("Datagrams a second that may come, 1 to 100000000; more are dropped. None: any number.")
    ] = None
    max_bps: Annotated[
        int | None, _about("Bits of payload a second that may come, 1000 to 1000000000000. None: any number.")
    ] = None
    secondary: Annotated[
        ConfiguredSecondary | None,
        _about("The other of two inputs that carry the same: see Protection. None: one input."),
    ] = None
    protection: Annotated[
        Protection | None,
        _about(
            '`"seamless"`: the two inputs become one RTP stream. `"failover"`: the second stands by. None: one input.'
        ),
    ] = None


@dataclass(frozen=True)
class Span:
    """Consecutive addresses or ports, as numbers."""

    first: int
    count: int


@dataclass(frozen=True)
class Input:
    """What fields stand for: one group and port of an entry. `index` counts from 0, and so do the other two."""

    index: int
    group_index: int
    port_index: int
    group: int
    port: int

    def number(self, name: str) -> int:
        """The value of a field that is a number."""
        if name == "n":
            return self.index + 1
        if name == "port":
            return self.port
        return self.group >> 8 * (4 - int(name[1])) & 0xFF


Render = Callable[[Input], str]
Made = TypeVar("Made")


def dotted(address: int) -> str:
    """An IPv4 address as text."""
    return socket.inet_ntoa(address.to_bytes(4, "big"))


def _address(what: str, text: str) -> int:
    try:
        return int(ipaddress.IPv4Address(text))
    except ValueError:
        if ":" in text:
            raise RuleError(f"{what} {text} is IPv6, which is not supported yet: give an IPv4 address") from None
        raise RuleError(f"{what} {text!r} is not an IPv4 address such as 239.1.1.1") from None


def parse_groups(what: str, text: str) -> Span:
    """A network such as 239.1.1.0/24, all its addresses, or a range such as 239.1.1.10-239.1.1.20. Raises RuleError."""
    if "/" in text:
        address, _, bits = text.partition("/")
        first = _address(what, address)
        if not re.fullmatch(r"\d{1,2}", bits) or int(bits) > 32:
            raise RuleError(f"{what} {text!r}: give a prefix from 0 to 32, such as 239.1.1.0/24")
        count = 1 << 32 - int(bits)
        if first % count:
            raise RuleError(f"{what} {text}: this network begins at {dotted(first - first % count)}/{bits}")
        return Span(first, count)
    first_text, dash, last_text = text.partition("-")
    first = _address(what, first_text)
    last = _address(what, last_text) if dash else first
    if last < first:
        raise RuleError(f"{what} {text}: the range ends before it begins: give the lower address first")
    return Span(first, last - first + 1)


def parse_ports(what: str, text: str | int) -> Span:
    """A port, or a range such as 5000-5099. Raises RuleError."""
    match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", str(text))
    first = int(match[1]) if match else 0
    last = int(match[2] or match[1]) if match else 0
    if not 1 <= first <= PORT_MAX or not last <= PORT_MAX:
        raise RuleError(f"{what} {text}: give a port from 1 to {PORT_MAX}, or a range such as 5000-5099")
    if last < first:
        raise RuleError(f"{what} {text}: the range ends before it begins: give the lower port first")
    return Span(first, last - first + 1)


def _template(what: str, text: str) -> Render:
    """What fills in the fields of a text. Raises RuleError for a field that there is not."""
    pieces: list[str | Render] = []
    for index, piece in enumerate(FIELD.split(text)):
        if index % 2 == 0:
            if "{" in piece or "}" in piece:
                raise RuleError(f"{what} {text!r}: a brace without its other one; fields are {FIELDS_HELP}")
            pieces.append(piece)
        elif piece == "group":
            pieces.append(lambda at: dotted(at.group))
        else:
            pieces.append(_number(what, piece))
    return lambda at: "".join(piece if isinstance(piece, str) else piece(at) for piece in pieces)


def _number(what: str, field: str) -> Render:
    match = NUMBER.fullmatch(field)
    if match is None:
        raise RuleError(f"{what}: no field {{{field}}}; there are {FIELDS_HELP}")
    name, offset = match[1], int(match[2] or 0)
    return lambda at: str(at.number(name) + offset)


def _along(what: str, span: Span, of_input: Span | None, unit: str) -> None:
    """Raises RuleError when another range of an entry is not as long as the input's, if that is known."""
    if of_input is not None and span.count not in (1, of_input.count):
        raise RuleError(
            f"{what} has {span.count} {unit}, the input {of_input.count}: give as many, or one for all, "
            "or fields such as {group}"
        )


@dataclass(frozen=True)
class _OutputMaker:
    group: Render
    port: Render
    interface: str
    ttl: Ttl
    dscp: int | None

    def make(self, at: Input) -> Output:
        port = self.port(at)
        if not port.isdecimal():
            raise RuleError(f"output port {port}: give a port from 1 to {PORT_MAX}")
        return Output(self.group(at), int(port), self.interface, self.ttl, self.dscp)


def _group_maker(text: str, groups: Span | None, what: str = "output group") -> Render:
    if "{" in text or "}" in text:
        return _template(what, text)
    if "/" not in text and "-" not in text:
        return lambda _: text
    span = parse_groups(what, text)
    _along(f"{what} {text}", span, groups, "addresses")
    if span.count == 1:
        return lambda _: dotted(span.first)
    return lambda at: dotted(span.first + at.group_index)


def _port_maker(text: str | int, ports: Span | None, what: str = "output port") -> Render:
    if isinstance(text, int):
        return lambda _: str(text)
    if "{" in text or "}" in text:
        return _template(what, text)
    span = parse_ports(what, text)
    _along(f"{what} {text}", span, ports, "ports")
    return lambda at: str(span.first + (at.port_index if span.count > 1 else 0))


@dataclass(frozen=True)
class _SecondaryMaker:
    group: Render | None
    port: Render | None
    interface: str | None
    source: str | None

    def make(self, at: Input) -> Secondary:
        port = self.port(at) if self.port else None
        if port is not None and not port.isdecimal():
            raise RuleError(f"secondary input port {port}: give a port from 1 to {PORT_MAX}")
        return Secondary(
            input_group=self.group(at) if self.group else None,
            input_port=None if port is None else int(port),
            input_interface=self.interface,
            source=self.source,
        )


def _secondary_maker(secondary: ConfiguredSecondary, groups: Span | None, ports: Span | None) -> _SecondaryMaker:
    group, port = secondary.input_group, secondary.input_port
    return _SecondaryMaker(
        None if group is None else _group_maker(group, groups, "secondary input group"),
        None if port is None else _port_maker(port, ports, "secondary input port"),
        secondary.input_interface,
        secondary.source,
    )


def _output_maker(output: ConfiguredOutput | str, groups: Span | None, ports: Span | None) -> _OutputMaker:
    if isinstance(output, str):
        output = ConfiguredOutput(*split_output(output))
    return _OutputMaker(
        _group_maker(output.group, groups), _port_maker(output.port, ports), output.interface, output.ttl, output.dscp
    )


def _inputs(groups: Span, ports: Span) -> Iterator[Input]:
    for i in range(groups.count):
        for j in range(ports.count):
            yield Input(i * ports.count + j, i, j, groups.first + i, ports.first + j)


class _Attempts:
    """Collects why things could not be made, of each place the first reason."""

    def __init__(self) -> None:
        self.found: dict[KeyPath, str] = {}

    def make(self, path: KeyPath, maker: Callable[[], Made]) -> Made | None:
        """What `maker` makes; None when it raises RuleError."""
        try:
            return maker()
        except RuleError as error:
            self.found.setdefault(path, str(error))
            return None


def expand(entry: ConfiguredRule) -> tuple[tuple[Rule, ...], tuple[Fault, ...]]:
    """The rules of an entry, checked and named; or none, and all that is wrong, of each place the first."""
    attempts = _Attempts()
    groups = attempts.make(("input_group",), partial(parse_groups, "input group", entry.input_group))
    ports = attempts.make(("input_port",), partial(parse_ports, "input port", entry.input_port))
    count = (groups.count if groups else 1) * (ports.count if ports else 1)
    if count > RULES_OF_A_RANGE_MAX:
        key = "input_group" if groups is not None and groups.count > 1 else "input_port"
        return (), (((key,), f"{count} rules, of one entry at most {RULES_OF_A_RANGE_MAX}: make the range smaller"),)
    name = attempts.make(("rule_id",), partial(_template, "rule id", entry.rule_id))
    if count > 1 and entry.rule_id and "{" not in entry.rule_id:
        reason = f"rule id {entry.rule_id!r} would name all {count} rules: add {{group}}, {{port}} or {{n}}"
        attempts.found["rule_id",] = reason
    makers = [
        attempts.make(("outputs", index), partial(_output_maker, output, groups, ports))
        for index, output in enumerate(entry.outputs)
    ]
    second: _SecondaryMaker | None = None
    if entry.secondary is not None:
        second = attempts.make(("secondary",), partial(_secondary_maker, entry.secondary, groups, ports))
    make = partial(_make, entry, name, makers, second, attempts)
    if attempts.found or groups is None or ports is None or name is None:
        at = Input(0, 0, 0, groups.first if groups else UNKNOWN, ports.first if ports else 1)
        attempts.found |= dict(_other_faults(make(at), attempts.found))
        return (), tuple(attempts.found.items())
    return _make_all(entry, make, _inputs(groups, ports), attempts)


def _make(
    entry: ConfiguredRule,
    name: Render | None,
    makers: Sequence[_OutputMaker | None],
    second: _SecondaryMaker | None,
    attempts: _Attempts,
    at: Input,
) -> Rule:
    """The rule for one input, with something valid in the place of what can't be made."""
    secondary = attempts.make(("secondary",), partial(second.make, at)) if second is not None else None
    outputs = (
        (maker and attempts.make(("outputs", index), partial(maker.make, at)))
        or Output(dotted(UNKNOWN), index + 1, "lo")
        for index, maker in enumerate(makers)
    )
    rule = Rule(
        rule_id=name(at) if name else "unknown",
        input_group=dotted(at.group),
        input_port=at.port,
        outputs=tuple(outputs),
        input_interface=entry.input_interface,
        source=entry.source,
        preserve_source=entry.preserve_source,
        stall_ms=entry.stall_ms,
        max_pps=entry.max_pps,
        max_bps=entry.max_bps,
        secondary=secondary,
        protection=entry.protection if secondary or not entry.secondary else None,
    )
    return named(rule)


def _other_faults(rule: Rule, found: Collection[KeyPath]) -> Iterator[Fault]:
    """What is wrong with a rule besides what has been found: outputs are told singly before they are together."""
    are_told = any(path[0] == "outputs" for path in found)
    for path, reason in faults(rule):
        if path not in found and path[:2] not in found and not (path == ("outputs",) and are_told):
            yield path, reason


def _make_all(
    entry: ConfiguredRule,
    make: Callable[[Input], Rule],
    inputs: Iterator[Input],
    attempts: _Attempts,
) -> tuple[tuple[Rule, ...], tuple[Fault, ...]]:
    rules: dict[str, Rule] = {}
    for at in inputs:
        rule = make(at)
        attempts.found |= dict(_other_faults(rule, attempts.found))
        if rule.rule_id in rules:
            reason = f"rule id {entry.rule_id!r} names several rules {rule.rule_id}: add {{group}}, {{port}} or {{n}}"
            attempts.found.setdefault(("rule_id",), reason)
        if attempts.found:
            return (), tuple(attempts.found.items())
        rules[rule.rule_id] = rule
    return tuple(rules.values()), ()


def overlaps(entries: Sequence[Sequence[Rule]]) -> Iterator[tuple[int, Rule, Rule]]:
    """Where a rule of a range sends what another entry's rule sends, too, to the same place: once for each entry.

    Gives the entry's index, its rule, and the other. Entries of one rule each may do so between themselves.
    """
    seen: dict[tuple[str, int, str], list[Rule]] = defaultdict(list)
    for is_range in (False, True):
        for index, rules in enumerate(entries):
            if (len(rules) > 1) is not is_range:
                continue
            keys = [((r.input_group, r.input_port, output_name(output)), r) for r in rules for output in r.outputs]
            if is_range:
                found = ((rule, other) for key, rule in keys for other in seen[key] if _meet(rule, other))
                for rule, other in islice(found, 1):
                    yield index, rule, other
            for key, rule in keys:
                seen[key].append(rule)


def _meet(rule: Rule, other: Rule) -> bool:
    """Whether a datagram to the input of both may be taken in by both."""
    sources, interfaces = {rule.source, other.source}, {rule.input_interface, other.input_interface}
    return (None in sources or len(sources) == 1) and (None in interfaces or len(interfaces) == 1)
