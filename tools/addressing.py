"""Where test traffic goes: flows spread over groups, ports or source ports, on an interface. Shared by both tools."""

import ipaddress
import re
import socket
from dataclasses import dataclass

import psutil

IP_UDP_HEADER_BYTES = 28


class UsageError(Exception):
    """A wrong option: the message names it and what is allowed."""


@dataclass(frozen=True)
class Interface:
    """The interface that traffic leaves or enters by."""

    name: str
    index: int
    address: str
    mtu_bytes: int


def find_interface(text: str) -> Interface:
    """An interface by name or by one of its addresses. Raises UsageError."""
    for name, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            if address.family == socket.AF_INET and text in (name, address.address):
                mtu_bytes = psutil.net_if_stats()[name].mtu
                return Interface(name, socket.if_nametoindex(name), address.address, mtu_bytes)
    names = ", ".join(sorted(psutil.net_if_addrs()))
    raise UsageError(f"--interface {text}: no interface with an IPv4 address; this host has {names}")


def parse_group(text: str) -> ipaddress.IPv4Address:
    """A multicast group or unicast address. Raises UsageError."""
    try:
        return ipaddress.IPv4Address(text)
    except ValueError:
        raise UsageError(f"--group {text}: give an IPv4 address such as 239.1.1.1") from None


def spread(group: str, port: int, flows: int, by: str) -> list[tuple[str, int]]:
    """The destination of each flow. Raises UsageError when they leave the range of addresses or ports."""
    first = parse_group(group)
    last_port = port + (flows - 1 if by == "port" else 0)
    if not (port >= 1 and last_port <= 65_535):
        raise UsageError(f"--port {port}: ports from 1 to 65535, for {flows} flows up to {last_port}")
    if by == "group":
        return [(str(first + flow), port) for flow in range(flows)]
    if by == "port":
        return [(group, port + flow) for flow in range(flows)]
    return [(group, port)] * flows


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
