"""Rendering: from the bytes and typed arguments of a record to one printable line. Pure."""

import re
import socket
from collections.abc import Callable, Mapping, Sequence

_PLACEHOLDER = re.compile(r"\{(\d):(d|ip|port|dur|hex)\}|\{(\w+)\}")


def printable(raw: bytes) -> str:
    """Text in which nothing can move a cursor, start a line or forge one: the rest is escaped."""
    text = raw.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def duration(value_ns: int) -> str:
    """Nanoseconds in the unit that reads best."""
    for unit, size_ns in (("s", 1_000_000_000), ("ms", 1_000_000), ("µs", 1000)):
        if abs(value_ns) >= size_ns:
            return f"{value_ns / size_ns:.3g} {unit}"
    return f"{value_ns} ns"


_KINDS: dict[str, Callable[[int], str]] = {
    "d": str,
    "ip": lambda value: socket.inet_ntoa((value & 0xFFFFFFFF).to_bytes(4, "big")),
    "port": lambda value: str(value & 0xFFFF),
    "dur": duration,
    "hex": hex,
}


def render(template: str | None, number: int, arguments: Sequence[int], pairs: Mapping[str, str]) -> str:
    """Fill a registered format: `{0:ip}` takes an argument by kind, `{rule}` a pair's value."""
    if template is None:
        return f"(format {number} is not registered)"

    def fill(placeholder: re.Match[str]) -> str:
        index, kind, key = placeholder.groups()
        if key is not None:
            return pairs.get(key, "")
        return _KINDS[kind](arguments[int(index)]) if int(index) < len(arguments) else ""

    return printable(_PLACEHOLDER.sub(fill, template).encode())
