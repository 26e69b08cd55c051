"""Where test traffic goes: flows spread over groups, ports or source ports, on an interface. Shared by both tools."""

import contextlib
import ipaddress
import re
import socket
from dataclasses import dataclass

import psutil

from relay.sockaddr import SockAddr, is_of_link, sockaddr

HEADER_BYTES = {4: 28, 6: 48}  # IP and UDP, by version
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}

Group = ipaddress.IPv4Address | ipaddress.IPv6Address


class UsageError(Exception):
    """A wrong option: the message names it and what is allowed."""


@dataclass(frozen=True)
class Interface:
    """The interface that traffic leaves or enters by, and its address of the group's version."""

    name: str
    index: int
    address: str
    mtu_bytes: int

    def sockaddr(self, address: str, port: int) -> SockAddr:
        """What to bind or connect to on this interface."""
        return sockaddr(address, port, self.index)


def find_interface(text: str, version: int = 4) -> Interface:
    """An interface by name or by one of its addresses, with an address of this IP version. Raises UsageError.

    By name, it is the oldest. Link-local ones come last: what they send is not routed.
    """
    with contextlib.suppress(ValueError):
        text = str(ipaddress.ip_address(text))
    found: list[tuple[str, str]] = []
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            address = entry.address.partition("%")[0]
            if entry.family == FAMILY[version] and text in (name, address, f"{address}%{name}"):
                found.append((name, address))
    if version == 6:
        found.reverse()  # the kernel tells the newest first
    for name, own in sorted(found, key=lambda place: is_of_link(place[1])):
        return Interface(name, socket.if_nametoindex(name), own, psutil.net_if_stats()[name].mtu)
    names = ", ".join(sorted(psutil.net_if_addrs()))
    raise UsageError(f"--interface {text}: no interface with an IPv{version} address; this host has {names}")


def parse_group(text: str) -> Group:
    """A multicast group or unicast address of either version. Raises UsageError."""
    try:
        address = ipaddress.ip_address(text.removeprefix("[").removesuffix("]"))
    except ValueError:
        raise UsageError(f"--group {text}: give an address such as 239.1.1.1 or ff3e::1") from None
    if "%" in str(address):
        raise UsageError(f"--group {text}: give the address alone, --interface says on which link")
    return address


def missing_route(group: Group, interface: Interface) -> str:
    """Why IPv6 multicast may find no way out of an interface, and what helps; "" where that is not it."""
    if group.version == 4 or not group.is_multicast or interface.name != "lo":
        return ""
    return ": a host has no IPv6 multicast on lo until `ip -6 route add local ff00::/8 dev lo`"


def spread(group: str, port: int, flows: int, by: str) -> list[tuple[str, int]]:
    """The destination of each flow. Raises UsageError when they leave the range of addresses or ports."""
    first = parse_group(group)
    last_port = port + (flows - 1 if by == "port" else 0)
    if not (port >= 1 and last_port <= 65_535):
        raise UsageError(f"--port {port}: ports from 1 to 65535, for {flows} flows up to {last_port}")
    if by == "group":
        try:
            return [(str(first + flow), port) for flow in range(flows)]
        except ipaddress.AddressValueError:
            raise UsageError(f"--group {group}: there are no {flows} addresses from there on") from None
    if by == "port":
        return [(str(first), port + flow) for flow in range(flows)]
    return [(str(first), port)] * flows


SI = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}


def parse_rate(text: str, payload_bytes: int) -> float:
    """Datagrams per second, from `50000`, `50kpps`, `10Mbps` or `2.5Gbit/s` of payload; 0 for `max`.

    Raises UsageError.
    """
    if text == "max":
        return 0.0
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)(pps|bps|bit/s|)", text.lower())
    if match is None or float(match[1]) == 0:
        raise UsageError(f"--rate {text}: expected 50000, 50kpps, 10Mbps, 2.5Gbit/s or max")
    value = float(match[1]) * SI[match[2]]
    return value if match[3] in ("pps", "") else value / 8 / max(payload_bytes, 1)
