"""Socket addresses: an address as the kernel takes it, on an interface. Pure.

Some IPv6 addresses exist once a link, and mean another host on another link: the kernel asks for the interface's index
with them, as their scope. Addresses are valid text without a zone.
Source: man 7 ipv6, linux/in6.h, RFC 4007.
"""

import socket
import struct
from typing import Final

from relay.addresses import family, is_ipv6

SOCKADDR_STORAGE_BYTES: Final = 128
SCOPE_OF_LINK: Final = 2  # RFC 4291, 2.7: groups of scope 1 don't even leave the interface

SockAddr = tuple[str, int] | tuple[str, int, int, int]


def is_of_link(address: str) -> bool:
    """Whether an address exists once a link: fe80::/10, and groups of scope 1 and 2."""
    if not is_ipv6(address):
        return False
    first, second = socket.inet_pton(socket.AF_INET6, address)[:2]
    if first == 0xFF:
        return second & 0x0F <= SCOPE_OF_LINK
    return first == 0xFE and second & 0xC0 == 0x80


def scope(address: str, ifindex: int) -> int:
    """The scope that the kernel wants with an address: the interface's index, or 0."""
    return ifindex if is_of_link(address) else 0


def sockaddr(address: str, port: int, ifindex: int) -> SockAddr:
    """What `bind` and `connect` take."""
    return (address, port, 0, scope(address, ifindex)) if is_ipv6(address) else (address, port)


def sockaddr_storage(address: str, ifindex: int) -> bytes:
    """A struct sockaddr_storage with an address, as options for groups take it."""
    packed = socket.inet_pton(family(address), address)
    if is_ipv6(address):
        raw = struct.pack("=HHI16sI", socket.AF_INET6, 0, 0, packed, scope(address, ifindex))
    else:
        raw = struct.pack("=HH4s", socket.AF_INET, 0, packed)
    return raw.ljust(SOCKADDR_STORAGE_BYTES, b"\0")
