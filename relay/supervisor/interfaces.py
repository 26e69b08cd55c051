"""The host's network interfaces: a snapshot of them, and a socket that tells when to take another.

Owned by the supervisor. What the kernel announces is not parsed: any announcement leads to a new snapshot.
Source: man 7 rtnetlink, linux/if_addr.h, net/ipv6/addrconf.c (if6_seq_show).
"""

import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import psutil

from relay.addresses import canonical, unpacked
from relay.sockaddr import is_of_link

RTMGRP_LINK = 0x1  # linux/rtnetlink.h
RTMGRP_IPV4_IFADDR = 0x10
RTMGRP_IPV6_IFADDR = 0x100
IPV6_MIN_MTU = 1280  # linux/ipv6.h; below it the kernel takes IPv6 off an interface
IF_INET6 = Path("/proc/thread-self/net/if_inet6")  # not there on a kernel without IPv6
IFA_F_TEMPORARY = 0x01  # linux/if_addr.h: changes every day, for privacy
IFA_F_OPTIMISTIC = 0x04
IFA_F_DADFAILED = 0x08
IFA_F_DEPRECATED = 0x20
IFA_F_TENTATIVE = 0x40
ANNOUNCEMENT_BYTES_MAX = 65_536


class Interface(msgspec.Struct, frozen=True):
    """An interface as far as the relay cares."""

    name: str
    index: int
    is_up: bool
    has_carrier: bool
    mtu_bytes: int
    addresses: tuple[str, ...]  # IPv4, the primary one first
    addresses6: tuple[str, ...] = ()  # IPv6, those that can be sent from; the best one first

    def fault(self, ipv6: bool = False) -> str | None:
        """Why nothing can be sent or received here now, None when it can."""
        if not self.is_up:
            return f"interface {self.name} is down"
        if ipv6 and self.mtu_bytes < IPV6_MIN_MTU:
            return f"interface {self.name} has an MTU of {self.mtu_bytes} bytes, and IPv6 needs {IPV6_MIN_MTU}"
        if ipv6 and not self.addresses6:
            return f"interface {self.name} has no IPv6 address"
        if not ipv6 and not self.addresses:
            return f"interface {self.name} has no IPv4 address"
        return None


def parse_flags(if_inet6: str) -> dict[tuple[str, str], int]:
    """The flags of each IPv6 address, by interface and address, of the text of /proc/net/if_inet6."""
    rows = (line.split() for line in if_inet6.splitlines())
    return {(name, unpacked(bytes.fromhex(address))): int(flags, 16) for address, _, _, _, flags, name in rows}


def in_order(flags: Mapping[str, int]) -> tuple[str, ...]:
    """Of one interface's IPv6 addresses, newest first, with their flags: those that can be sent from, the best first.

    A link-local address comes last, as no router passes on what it sends; before it one that is deprecated, then one
    that changes every day. The oldest of the rest is first, so that one more address changes nothing.
    """

    def rank(address: str) -> tuple[bool, ...]:
        return is_of_link(address), bool(flags[address] & IFA_F_DEPRECATED), bool(flags[address] & IFA_F_TEMPORARY)

    return tuple(sorted((address for address in reversed(list(flags)) if _is_usable(flags[address])), key=rank))


def _is_usable(flags: int) -> bool:
    """Whether no other host has the address, as far as is known."""
    is_tentative = flags & IFA_F_TENTATIVE and not flags & IFA_F_OPTIMISTIC
    return not is_tentative and not flags & IFA_F_DADFAILED


def _flags() -> dict[tuple[str, str], int]:
    try:
        return parse_flags(IF_INET6.read_text())
    except OSError:
        return {}


def snapshot() -> dict[str, Interface]:
    """The interfaces of this network namespace by name."""
    addresses, flags = psutil.net_if_addrs(), _flags()
    interfaces = {}
    for name, state in psutil.net_if_stats().items():
        try:
            index = socket.if_nametoindex(name)
        except OSError:  # gone since it was listed
            continue
        ipv6 = [canonical(a.address.partition("%")[0]) for a in addresses.get(name, ()) if a.family == socket.AF_INET6]
        interfaces[name] = Interface(
            name=name,
            index=index,
            is_up=state.isup or "up" in state.flags.split(","),
            has_carrier=state.isup,
            mtu_bytes=state.mtu,
            addresses=tuple(a.address for a in addresses.get(name, ()) if a.family == socket.AF_INET),
            addresses6=in_order({a: flags[name, a] for a in ipv6 if (name, a) in flags}),
        )
    return interfaces


def without_carriers(present: Mapping[str, Interface]) -> list[Interface]:
    """What rules depend on: a carrier that comes or goes changes nothing of what is open or joined."""
    return [msgspec.structs.replace(interface, has_carrier=False) for interface in present.values()]


def differences(
    former: Mapping[str, Interface], present: Mapping[str, Interface], without_carrier: set[str]
) -> Iterator[str]:
    """A line for each interface that came or went, and for each change of one: up, carrier, addresses, MTU.

    `without_carrier` is the caller's, and kept here: whose loss was told. After coming up a carrier takes a moment.
    """
    for name in sorted({*former, *present}):
        before, after = former.get(name), present.get(name)
        if before is None or after is None or before.index != after.index:
            without_carrier.discard(name)
        if after is None:
            yield f"Interface {name} is gone"
        elif before is None or before.index != after.index:
            yield f"Interface {name} appeared, {'up' if after.is_up else 'down'}"
        else:
            yield from _changes(before, after, without_carrier)


def _changes(before: Interface, after: Interface, without_carrier: set[str]) -> Iterator[str]:
    name = after.name
    if before.is_up != after.is_up:
        without_carrier.discard(name)
        yield f"Interface {name} is {'up' if after.is_up else 'down'}"
    elif after.is_up and before.has_carrier and not after.has_carrier:
        without_carrier.add(name)
        yield f"Interface {name} has no carrier"
    elif after.has_carrier and name in without_carrier:
        without_carrier.discard(name)
        yield f"Interface {name} has a carrier again"
    if before.addresses != after.addresses:
        yield f"Interface {name} has {', '.join(after.addresses) or 'no IPv4 address'}"
    if before.addresses6 != after.addresses6:
        yield f"Interface {name} has {', '.join(after.addresses6) or 'no IPv6 address'}"
    if before.mtu_bytes != after.mtu_bytes:
        yield f"Interface {name} has an MTU of {after.mtu_bytes} bytes"


class InterfaceMonitor:
    """A netlink socket, readable when interfaces or addresses changed."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
        self._socket.bind((0, RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR))

    def fileno(self) -> int:
        """The descriptor to poll."""
        return self._socket.fileno()

    def discard(self) -> None:
        """Read the announcements that wait."""
        while True:
            try:
                self._socket.recv(ANNOUNCEMENT_BYTES_MAX)
            except BlockingIOError:
                return
            except OSError:  # ENOBUFS: some were lost, which is all the same here
                continue

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
