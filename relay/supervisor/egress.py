"""Egress sockets: one UDP socket for each distinct output, shared by all workers.

Privileged where the source address is preserved (CAP_NET_ADMIN for IP_TRANSPARENT) and to bind to a device.
Source: man 7 ip, man 7 ipv6, man 7 udp, man 7 socket, linux/in6.h.
"""

import errno
import socket
import struct

import msgspec

from relay import bpf
from relay.addresses import endpoint, family, is_ipv6, is_multicast
from relay.errors import RelayError
from relay.sockaddr import sockaddr
from relay.supervisor.ingress import attach_filter
from relay.supervisor.interfaces import Interface

IP_RECVERR = 11
IP_TRANSPARENT = 19
IP_MTU_DISCOVER = 10
IP_PMTUDISC_DONT = 0  # fragment what is larger than the MTU, as the sender's own host would
IPV6_MTU_DISCOVER = 23
IPV6_PMTUDISC_DONT = 0
IPV6_RECVERR = 25
IPV6_DONTFRAG = 62
IPV6_TRANSPARENT = 75
SO_SNDBUFFORCE = 32
SEND_BUFFER_BYTES = 16 << 20  # a burst of 4 000 datagrams of a stream, at 4 KiB of memory each
IP_UDP_HEADER_BYTES = 28
IPV6_UDP_HEADER_BYTES = 48
TTL_MULTICAST_DEFAULT = 1


class EgressKey(msgspec.Struct, frozen=True):
    """What distinguishes one egress socket from another. Outputs with equal keys share it."""

    group: str
    port: int
    ifindex: int
    interface: str
    address: str  # the interface's own
    mtu_bytes: int
    ttl: int | None
    dscp: int | None
    preserve_source: bool

    @property
    def is_ipv6(self) -> bool:
        """Whether datagrams leave as IPv6."""
        return is_ipv6(self.group)

    @property
    def is_connected(self) -> bool:
        """Multicast sockets are connected, which spares a route lookup for each send.

        Unicast ones are not: an ICMP error for a receiver that is away would fail a later send.
        """
        return is_multicast(self.group) and not self.preserve_source

    @property
    def gso_segment_bytes_max(self) -> int:
        """The largest payload that leaves in one frame, so that segmentation makes no fragments."""
        return self.mtu_bytes - (IPV6_UDP_HEADER_BYTES if self.is_ipv6 else IP_UDP_HEADER_BYTES)


def egress_key(
    group: str, port: int, interface: Interface, ttl: int | None, dscp: int | None, preserve_source: bool
) -> EgressKey:
    """The key of an output on an interface that has an address of the group's family."""
    return EgressKey(
        group=group,
        port=port,
        ifindex=interface.index,
        interface=interface.name,
        address=(interface.addresses6 if is_ipv6(group) else interface.addresses)[0],
        mtu_bytes=interface.mtu_bytes,
        ttl=ttl,
        dscp=dscp,
        preserve_source=preserve_source,
    )


def open_egress(key: EgressKey) -> socket.socket:
    """Open the socket of an output. Raises RelayError when the kernel refuses, with its reason."""
    try:
        egress = socket.socket(family(key.group), socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            _set_up(egress, key)
        except OSError:
            egress.close()
            raise
    except OSError as error:
        reason = f"{error.strerror}{_missing_route(key) if error.errno == errno.ENETUNREACH else ''}"
        raise RelayError(f"output {endpoint(key.group, key.port)} on {key.interface}: {reason}") from error
    return egress


def _missing_route(key: EgressKey) -> str:
    """What helps where IPv6 multicast finds no way out: on lo it never does by itself."""
    if not key.is_ipv6 or not is_multicast(key.group):
        return ""
    kind = "local" if key.interface == "lo" else "multicast"
    return f": `ip -6 route add {kind} ff00::/8 dev {key.interface} table local` makes a way"


def _set_up(egress: socket.socket, key: EgressKey) -> None:
    attach_filter(egress, bpf.REJECT_ALL)  # nobody reads here: answers must not fill a buffer
    egress.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, SEND_BUFFER_BYTES)
    egress.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, key.interface.encode() + b"\0")
    if key.is_ipv6:
        _set_up_ipv6(egress, key)
    else:
        _set_up_ipv4(egress, key)
    if key.is_connected:
        egress.connect(sockaddr(key.group, key.port, key.ifindex))


def _set_up_ipv4(egress: socket.socket, key: EgressKey) -> None:
    egress.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DONT)
    if key.preserve_source:
        egress.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
    egress.bind((key.address, 0))
    if key.dscp is not None:
        egress.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, key.dscp << 2)
    if is_multicast(key.group):
        mreqn = struct.pack("@4s4si", bytes(4), socket.inet_aton(key.address), key.ifindex)
        egress.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, mreqn)
        egress.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
        egress.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, key.ttl or TTL_MULTICAST_DEFAULT)
        # What a full queue drops is told, to be counted. Not for unicast, where an ICMP error would fail a later send.
        egress.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
    elif key.ttl is not None:
        egress.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, key.ttl)


def _set_up_ipv6(egress: socket.socket, key: EgressKey) -> None:
    """The same with IPv6's options. Who is told that a packet is too big fragments it, as no router does."""
    egress.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    egress.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, IPV6_PMTUDISC_DONT)
    egress.setsockopt(socket.IPPROTO_IPV6, IPV6_DONTFRAG, 0)
    if key.preserve_source:
        egress.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
    egress.bind(sockaddr(key.address, 0, key.ifindex))
    if key.dscp is not None:
        egress.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, key.dscp << 2)
    if is_multicast(key.group):
        egress.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, key.ifindex)
        egress.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_LOOP, 1)
        egress.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, key.ttl or TTL_MULTICAST_DEFAULT)
        egress.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVERR, 1)
    elif key.ttl is not None:
        egress.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, key.ttl)
