"""Group memberships: sockets that join, so that switches and the NIC deliver, and that receive nothing.

Owned by the supervisor. A socket holds as many memberships as the kernel allows (igmp_max_memberships, and
igmp_max_msf sources of a group; for IPv6 optmem_max bytes of them, and mld_max_msf sources); when it refuses one, the
next socket takes it. Unicast inputs are held by a bound socket that discards, so that the host answers no ICMP port
unreachable.
Source: man 7 ip, linux/in.h, linux/in6.h, net/ipv6/mcast.c.
"""

import errno
import socket
import struct
from collections.abc import Collection, Mapping
from pathlib import Path

import msgspec

from relay import bpf
from relay.addresses import endpoint, family, is_ipv6, is_multicast, unpacked
from relay.errors import RelayError
from relay.sockaddr import sockaddr, sockaddr_storage
from relay.supervisor.ingress import attach_filter

MCAST_JOIN_GROUP = 42
MCAST_LEAVE_GROUP = 45
MCAST_JOIN_SOURCE_GROUP = 46
MCAST_LEAVE_SOURCE_GROUP = 47
IGMP_MAX_MEMBERSHIPS = 20  # net/ipv4/igmp.c, unless the sysctl says more
IPV6_MEMBERSHIPS = 80  # each takes 240 bytes with a source, of optmem_max: 20 KiB, or more
IGMP6 = Path("/proc/thread-self/net/igmp6")  # a line each: ifindex, name, group …
# The socket is full; or the group is joined on it with and without a source, which one socket can't hold.
ANOTHER_SOCKET_HELPS = (errno.ENOBUFS, errno.ENOMEM, errno.EADDRINUSE, errno.EINVAL)


class Listen(msgspec.Struct, frozen=True):
    """What an input needs from the host: a group on an interface, or a unicast address and port."""

    address: str
    port: int  # 0 for groups, which are joined once for all ports
    ifindex: int  # 0 for unicast addresses, but for those that exist once a link
    source: str | None


def _membership_option(listen: Listen, join: bool) -> tuple[int, int, bytes]:
    """Level, option and its struct: ip_mreqn, group_req for IPv6, or group_source_req for a source."""
    level = socket.IPPROTO_IPV6 if is_ipv6(listen.address) else socket.IPPROTO_IP
    if listen.source is None and not is_ipv6(listen.address):
        option = socket.IP_ADD_MEMBERSHIP if join else socket.IP_DROP_MEMBERSHIP
        return level, option, struct.pack("@4s4si", socket.inet_aton(listen.address), bytes(4), listen.ifindex)
    request = struct.pack("@I4x", listen.ifindex) + sockaddr_storage(listen.address, listen.ifindex)
    if listen.source is None:
        return level, MCAST_JOIN_GROUP if join else MCAST_LEAVE_GROUP, request
    option = MCAST_JOIN_SOURCE_GROUP if join else MCAST_LEAVE_SOURCE_GROUP
    return level, option, request + sockaddr_storage(listen.source, listen.ifindex)


def _not_held(listen: Listen, error: OSError) -> str:
    """Why an input is not held. It is relayed all the same: the packet ring takes what has this host's MAC address."""
    if error.errno == errno.EADDRNOTAVAIL:
        return (
            f"{listen.address} is no address of this host: only what is routed through it comes to the relay: "
            "give an address of this host, or a multicast group"
        )
    place = endpoint(listen.address, listen.port)
    return f"{place} is not held for the relay: {error.strerror}: see `ss -ulnp` for who has it"


class Memberships:
    """Everything that is joined or held now; `update` makes it what is wanted."""

    def __init__(self) -> None:
        self._joiners: list[socket.socket] = []
        self._joined: dict[Listen, socket.socket] = {}
        self._held: dict[Listen, socket.socket] = {}

    def adopt(self, joined: Mapping[Listen, socket.socket], held: Mapping[Listen, socket.socket]) -> None:
        """Go on with the sockets of a former supervisor, before anything else: no membership lapses."""
        self._joined = dict(joined)
        self._joiners = list({id(joiner): joiner for joiner in joined.values()}.values())
        self._held = dict(held)

    @property
    def joined(self) -> Mapping[Listen, socket.socket]:
        """What is joined, and with which socket."""
        return self._joined

    @property
    def held(self) -> Mapping[Listen, socket.socket]:
        """The unicast inputs that are held, and with which socket."""
        return self._held

    def sockets_wanted(self, wanted: Collection[Listen]) -> int:
        """How many more sockets these may take, where the kernel's limits are what they are by default."""
        new = [listen for listen in wanted if listen not in self._joined and listen not in self._held]
        groups = [listen for listen in new if is_multicast(listen.address)]
        ipv6 = sum(is_ipv6(listen.address) for listen in groups)
        joiners = -(-(len(groups) - ipv6) // IGMP_MAX_MEMBERSHIPS) + -(-ipv6 // IPV6_MEMBERSHIPS)
        return len(new) - len(groups) + joiners

    def update(self, wanted: Collection[Listen]) -> list[str]:
        """Join what is new, then leave what is no longer wanted; return warnings, one a refusal."""
        for listen in self.lapsed():
            self._leave(listen)
        warnings = []
        for listen in wanted:
            if listen in self._joined or listen in self._held:
                continue
            try:
                if is_multicast(listen.address):
                    self._join(listen)
                else:
                    self._hold(listen)
            except RelayError as error:
                warnings.append(str(error))
        keep = set(wanted)
        for listen in [listen for listen in self._joined if listen not in keep]:
            self._leave(listen)
        for listen in [listen for listen in self._held if listen not in keep]:
            self._held.pop(listen).close()
        return warnings

    def lapsed(self) -> list[Listen]:
        """IPv6 groups that the sockets hold, but the kernel does not: it drops an interface's when its MTU is too small
        for IPv6 for a moment, and joins none of them again. `update` does.
        """
        ipv6 = [listen for listen in self._joined if is_ipv6(listen.address)]
        try:
            rows = [line.split() for line in IGMP6.read_text().splitlines()] if ipv6 else []
        except OSError:  # it can't be told
            return []
        there = {(int(row[0]), unpacked(bytes.fromhex(row[2]))) for row in rows}
        return [listen for listen in ipv6 if (listen.ifindex, listen.address) not in there]

    def forget(self, ifindex: int) -> None:
        """Leave what was joined on an interface that went: `update` joins again on one with the same index."""
        for listen in [listen for listen in self._joined if listen.ifindex == ifindex]:
            self._leave(listen)

    def _join(self, listen: Listen) -> None:
        """Join with the newest socket of the address's family or, when that one is full, with another."""
        level, option, request = _membership_option(listen, join=True)
        wanted = family(listen.address)
        newest = next((joiner for joiner in reversed(self._joiners) if joiner.family == wanted), None)
        if newest is not None:
            try:
                newest.setsockopt(level, option, request)
            except OSError as error:
                if error.errno not in ANOTHER_SOCKET_HELPS:
                    raise self._refusal(listen, error) from error
            else:
                self._joined[listen] = newest
                return
        joiner = self._socket(listen)
        try:
            joiner.setsockopt(level, option, request)
        except OSError as error:
            joiner.close()
            raise self._refusal(listen, error) from error
        self._joiners.append(joiner)
        self._joined[listen] = joiner

    def _socket(self, listen: Listen) -> socket.socket:
        try:
            return socket.socket(family(listen.address), socket.SOCK_DGRAM)
        except OSError as error:
            raise self._refusal(listen, error) from error

    def _refusal(self, listen: Listen, error: OSError) -> RelayError:
        return RelayError(f"joining {listen.address} on interface {listen.ifindex}: {error.strerror}")

    def _leave(self, listen: Listen) -> None:
        joiner = self._joined.pop(listen)
        level, option, request = _membership_option(listen, join=False)
        try:
            joiner.setsockopt(level, option, request)
        except OSError as error:
            # The membership went with its interface.
            if error.errno not in (errno.ENODEV, errno.EADDRNOTAVAIL, errno.EINVAL):
                raise
        if all(used is not joiner for used in self._joined.values()):
            self._joiners.remove(joiner)
            joiner.close()

    def _hold(self, listen: Listen) -> None:
        holder = self._socket(listen)
        attach_filter(holder, bpf.REJECT_ALL)
        try:
            holder.bind(sockaddr(listen.address, listen.port, listen.ifindex))
        except OSError as error:
            holder.close()
            raise RelayError(_not_held(listen, error)) from error
        self._held[listen] = holder

    def close(self) -> None:
        """Leave everything."""
        for opened in (*self._joiners, *self._held.values()):
            opened.close()
        self._joiners.clear()
        self._joined.clear()
        self._held.clear()
