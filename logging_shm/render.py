"""Rendering: from the bytes and typed arguments of a record to printable text. Pure.

    "First packet from {0:ip}:{1:port} of {rule}"

A placeholder takes an argument by its number and kind, or a pair's value by its key. `{0:endpoint}` takes three: both
halves of an IPv6 address in memory order, IPv4 in its mapped form (RFC 4291, 2.5.5.2), and a port. lines.py does the
same in compiled code, from `steps`; tests hold the two against each other.
"""

import ipaddress
import re
import socket
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence

UNICODE_SHOWN = 0x20000  # beyond lie rare ideographs: not worth a greater table in compiled code


def printable(raw: bytes) -> str:
    """Text in which nothing can move a cursor, start a line or forge one: the rest is escaped."""
    text = raw.decode("utf-8", "backslashreplace")
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if is_shown(c) else c.encode("unicode_escape").decode() for c in text)


def is_shown(character: str) -> bool:
    """Whether a character may stand in a line as it is: printable, and of the first two planes of Unicode."""
    return character.isprintable() and ord(character) < UNICODE_SHOWN


def duration(value_ns: int) -> str:
    """Nanoseconds in the greatest unit that they fill, with three decimals."""
    for unit, size_ns in (("s", 1_000_000_000), ("ms", 1_000_000), ("µs", 1000)):
        if abs(value_ns) >= size_ns:
            whole, rest = divmod(abs(value_ns), size_ns)
            return f"{'-' if value_ns < 0 else ''}{whole}.{rest * 1000 // size_ns:03d} {unit}"
    return f"{value_ns} ns"


def real(value: int) -> str:
    """A float, given as its eight bytes: six significant digits, as C's %g has them."""
    return f"{struct.unpack('<d', struct.pack('<q', value))[0]:g}"


def endpoint(first: int, second: int, port: int) -> str:
    """`10.0.0.7:5001` or `[2001:db8::7]:5001` (RFC 5952)."""
    address = ipaddress.IPv6Address(struct.pack("<qq", first, second))
    host = address.ipv4_mapped or f"[{address}]"
    return f"{host}:{port & 0xFFFF}"


KINDS: Mapping[str, Callable[[int], str]] = {
    "d": str,
    "g": real,
    "ip": lambda value: socket.inet_ntoa((value & 0xFFFFFFFF).to_bytes(4, "big")),
    "port": lambda value: str(value & 0xFFFF),
    "dur": duration,
    "hex": lambda value: hex(value & 0xFFFF_FFFF_FFFF_FFFF),
}
ENDPOINT = "endpoint"
ENDPOINT_ARGUMENTS = 3
PLACEHOLDER = re.compile(rf"\{{(\d):({'|'.join((*KINDS, ENDPOINT))})\}}|\{{(\w+)\}}")


def render(template: str | None, number: int, arguments: Sequence[int], pairs: Mapping[str, str]) -> str:
    """Fill a registered format: `{0:ip}` takes an argument by kind, `{rule}` a pair's value. `pairs` are printable."""
    if template is None:
        return f"(format {number} is not registered)"

    def fill(placeholder: re.Match[str]) -> str:
        index, kind, key = placeholder.groups()
        if key is not None:
            return pairs.get(printable(key.encode()), "")
        taken = arguments[int(index) :]
        if kind == ENDPOINT:
            return endpoint(*taken[:ENDPOINT_ARGUMENTS]) if len(taken) >= ENDPOINT_ARGUMENTS else ""
        return KINDS[kind](taken[0]) if taken else ""

    return printable(PLACEHOLDER.sub(fill, template).encode())


def steps(template: str) -> Iterator[tuple[str, bytes, int]]:
    """A format taken apart: ("literal", text, 0), ("pair", key, 0), or (kind, b"", argument)."""
    at = 0
    for placeholder in PLACEHOLDER.finditer(template):
        if placeholder.start() > at:
            yield "literal", printable(template[at : placeholder.start()].encode()).encode(), 0
        index, kind, key = placeholder.groups()
        yield ("pair", key.encode(), 0) if key is not None else (kind, b"", int(index))
        at = placeholder.end()
    if at < len(template):
        yield "literal", printable(template[at:].encode()).encode(), 0
