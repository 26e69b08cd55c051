"""Addresses: IPv4 and IPv6 as text, and as the two halves that the data path compares. Pure.

Between modules an address is text, as `canonical` writes it. The data path and its counters hold each address as an
IPv6 one, IPv4 as its mapped form ::ffff:a.b.c.d (RFC 4291, 2.5.5.2): 16 bytes in network order, read as two
little-endian numbers of eight bytes. One comparison serves both families, and nothing has its bytes swapped.
"""

import ipaddress
import socket
import struct
from functools import lru_cache
from typing import Final

ADDRESS_BYTES: Final = 16
MAPPED_PREFIX: Final = bytes(10) + b"\xff\xff"
HALVES: Final = struct.Struct("<qq")
ANY: Final = (0, 0)  # :: is never an address of a datagram's receiver, nor of a sender that a rule can name

HALVES_KEPT: Final = 16_384  # RULES_MAX; 3 MB

Halves = tuple[int, int]


def is_ipv6(address: str) -> bool:
    """Whether a valid address is one of IPv6."""
    return ":" in address


def family(address: str) -> socket.AddressFamily:
    """AF_INET or AF_INET6, of a valid address."""
    return socket.AF_INET6 if is_ipv6(address) else socket.AF_INET


def canonical(text: str) -> str:
    """An IPv6 address as RFC 5952 writes it; any other text as it is."""
    if not is_ipv6(text) or "%" in text:
        return text
    try:
        return str(ipaddress.IPv6Address(text))
    except ValueError:
        return text


def is_multicast(address: str) -> bool:
    """Whether a valid address is in 224.0.0.0/4 or ff00::/8."""
    if is_ipv6(address):
        return socket.inet_pton(socket.AF_INET6, address)[0] == 0xFF
    return socket.inet_aton(address)[0] >> 4 == 0xE


def packed(address: str) -> bytes:
    """A valid address as 16 bytes in network order. Takes a seventh of ipaddress's time."""
    if is_ipv6(address):
        return socket.inet_pton(socket.AF_INET6, address)
    return MAPPED_PREFIX + socket.inet_aton(address)


def unpacked(raw: bytes) -> str:
    """The text of 16 bytes in network order, canonical."""
    if raw.startswith(MAPPED_PREFIX):
        return socket.inet_ntoa(raw[len(MAPPED_PREFIX) :])
    return str(ipaddress.IPv6Address(raw))


@lru_cache(HALVES_KEPT)
def halves(address: str) -> Halves:
    """A valid address as the data path holds it. Kept: each change of rules asks for all of them again."""
    first, second = HALVES.unpack(packed(address))
    return first, second


def text_of(first: int, second: int) -> str:
    """The text of an address as the data path holds it."""
    return unpacked(HALVES.pack(first, second))


def bracketed(address: str) -> str:
    """An address as it stands before a port: IPv6 in brackets (RFC 3986)."""
    return f"[{address}]" if is_ipv6(address) else address


def endpoint(address: str, port: int) -> str:
    """`239.1.1.1:5000` or `[ff3e::1]:5000`."""
    return f"{bracketed(address)}:{port}"
