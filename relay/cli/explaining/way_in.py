"""The way in: interface, own egress, memberships, packet filter, workers. Pure, but a kernel runs the filter."""

import ipaddress
import socket
import struct
from collections.abc import Collection, Mapping, Sequence

from relay import bpf
from relay.addresses import endpoint, family, is_ipv6, is_multicast, packed
from relay.cli.explaining.facts import Datagram, Facts, Step
from relay.cli.host import IFF_LOOPBACK, IFF_MULTICAST, IFF_UP, NO_QUERIER, UdpSocket
from relay.sockaddr import is_of_link
from relay.supervisor.egress import IP_UDP_HEADER_BYTES, EgressKey
from relay.supervisor.ingress import attach_filter

FRAME_BYTES_MAX = 128  # of those that `frame` makes


def likely_interface(
    source: str, networks: Mapping[str, Sequence[tuple[str, str]]], relayed_from: Sequence[str]
) -> tuple[str | None, str]:
    """Where a source's datagrams come in, and why that is assumed; `networks` are addresses with their netmasks.

    All links have the network of link-local addresses, which so tells nothing.
    """
    for name in () if is_of_link(source) else relayed_from:
        for address, mask in networks.get(name, ()):
            if family(address) != family(source):
                continue
            prefix = int.from_bytes(socket.inet_pton(family(mask), mask), "big").bit_count()
            network = ipaddress.ip_network(f"{address}/{prefix}", strict=False)
            if ipaddress.ip_address(source) in network:
                return name, f"{source} is in its network {network}"
    if len(relayed_from) == 1:
        return relayed_from[0], "the relay takes in from no other"
    return (relayed_from[0], "it is the relay's first") if relayed_from else (None, "")


def interface(facts: Facts, datagram: Datagram) -> Step:  # noqa: PLR0911 - one return a cause
    """Whether it reaches an interface that the relay takes in from."""
    name = datagram.interface
    interface = facts.interfaces.get(name)
    if interface is None:
        there = ", ".join(sorted(facts.interfaces))
        return Step("interface", "stop", f"interface {name} does not exist: there are {there}", "give --interface")
    if name not in facts.plan.rings:
        taken = ", ".join(facts.plan.rings) or "none"
        reason = f"the relay takes nothing in from {name}: it does from {taken}"
        remedy = f"start mcrd with --interface {name}, or give the rule --input-interface {name}"
        return Step("interface", "stop", reason, remedy)
    flags = facts.flags.get(name, IFF_UP | IFF_MULTICAST)
    if not flags & IFF_UP or not interface.is_up:
        return Step("interface", "stop", f"interface {name} is down", f"ip link set {name} up")
    if not facts.has_carrier.get(name, True):
        return Step("interface", "stop", f"interface {name} has no carrier", "see to cable, switch port or peer")
    if not (interface.addresses6 if datagram.is_ipv6 else interface.addresses):
        version = "IPv6" if datagram.is_ipv6 else "IPv4"
        reason = f"{name} has no {version} address: datagrams are taken in, but the host asks no switch for them"
        return Step("interface", "note", reason, f"ip addr add ADDRESS/PREFIX dev {name}")
    if not flags & (IFF_MULTICAST | IFF_LOOPBACK) and is_multicast(datagram.group):
        reason = f"{name} is relayed from and up, but has no MULTICAST flag: its driver may deliver no multicast"
        return Step("interface", "note", reason, f"ip link set {name} multicast on")
    assumed = f"; assumed, as {datagram.assumed}" if datagram.assumed else ""
    return Step("interface", "pass", f"{name} is up, and the relay takes in from it{assumed}")


def own_egress(facts: Facts, datagram: Datagram) -> Step:
    """Whether this host, or the relay itself, has sent it: a ring takes in neither, but for what others send on lo."""
    source = datagram.source
    if datagram.source_port is not None and (own := _own_socket(facts, datagram)) is not None:
        reason = (
            f"{endpoint(source, own.local[1])} is an output of this relay: what it sent itself is dropped as own_egress"
        )
        return Step("own egress", "stop", reason, "let one rule have both outputs, rather than chain two")
    holders = [there.name for there in facts.interfaces.values() if source in (*there.addresses, *there.addresses6)]
    loopback = facts.flags.get(datagram.interface, 0) & IFF_LOOPBACK
    if not loopback:
        if not holders:
            return Step("own egress", "pass", f"{source} is another host")
        reason = f"{source} is this host's own address: packet rings take in nothing that the host itself sends"
        remedy = "send from another host; or send through lo, and start mcrd with --interface lo"
        return Step("own egress", "stop", reason, remedy)
    senders = [
        planned.rule.rule_id
        for planned in facts.plan.rules
        for output in planned.outputs
        if output.key is not None and (output.key.preserve_source or output.key.address == source)
        if (output.output.group, output.output.port) == (datagram.group, datagram.port)
    ]
    if senders:
        reason = f"rule {senders[0]} sends to {datagram.destination} itself: its datagrams are dropped as own_egress"
        return Step("own egress", "note", reason + ", those of other programs pass", "give the source port to be sure")
    return Step("own egress", "pass", f"no output of the relay sends to {datagram.destination}")


def _own_socket(facts: Facts, datagram: Datagram) -> UdpSocket | None:
    """The relay's socket that sends from this very port, as is_own_source of match.py finds it.

    Sockets that are not connected look alike from outside: with several rules that preserve sources, the one that has
    this port may be that of another output.
    """
    keys = facts.plan.egress_keys()
    for udp in facts.sockets:
        is_ours = facts.own_inodes is None or udp.inode in facts.own_inodes
        if udp.local[1] == datagram.source_port and is_ours:
            for key in keys:
                if key.address == udp.local[0] and _sends(key, udp, datagram, facts.own_inodes is not None):
                    return udp
    return None


def _sends(key: EgressKey, udp: UdpSocket, datagram: Datagram, is_certain: bool) -> bool:
    """Whether this socket, if it is that of the output, has sent the datagram."""
    if key.is_connected:
        return (key.group, key.port) == udp.remote and key.address == datagram.source
    if udp.remote[1]:
        return False
    if key.preserve_source:
        return (key.group, key.port) == (datagram.group, datagram.port)
    return is_certain and key.address == datagram.source


def join(facts: Facts, datagram: Datagram) -> Step:
    """Whether the host asks switches for the group, and lets its NIC deliver it."""
    group, name = datagram.group, datagram.interface
    there = facts.interfaces.get(name)
    if not is_multicast(group):
        return _unicast(facts, datagram)
    index = there.index if there is not None else 0
    wanted = {listen.source for listen in facts.plan.listens if (listen.address, listen.ifindex) == (group, index)}
    if not wanted:
        return Step("join", "note", f"no rule wants {group} on {name}, so it is not joined for the relay")
    if facts.joined is None:
        return Step("join", "note", f"what is joined on {name} can't be read", "use sudo")
    here = facts.joined.get(name)
    if here is None or group not in here.groups:
        return Step("join", "stop", _not_joined(facts, group, name), _join_remedy(facts, group))
    if None not in wanted:
        return _join_source(facts, datagram, {source for source in wanted if source})
    told = not datagram.is_ipv6 and here.querier != NO_QUERIER
    querier = f"; the querier speaks IGMP{here.querier.lower()}" if told else ""
    return Step("join", "pass", f"{group} is joined on {name}, any source{querier}")


def _join_source(facts: Facts, datagram: Datagram, wanted: Collection[str]) -> Step:
    """The same where all rules of the group ask for sources."""
    source, joined = datagram.source, f"{datagram.group} is joined on {datagram.interface}"
    if source not in wanted:
        reason = f"{joined} for {', '.join(sorted(wanted))} only, not for {source}"
        return Step("join", "stop", reason, "add a rule for this source, or one without a source")
    here = facts.joined[datagram.interface] if facts.joined else None
    filters = facts.source_filters.get(here.ifindex) if here else None
    if filters is None:
        return Step("join", "note", f"{joined}; whether for {source}, the kernel does not show now")
    if not filters.get(datagram.group, {}).get(source):
        limit = "net.ipv6.mld_max_msf" if datagram.is_ipv6 else "net.ipv4.igmp_max_msf"
        remedy = f"the log of mcrd says why; `sysctl {limit}` shows how many sources a socket may ask for"
        return Step("join", "stop", f"{joined}, but not for {source}: the kernel refused it", remedy)
    querier = here.querier if here and not datagram.is_ipv6 else NO_QUERIER
    if querier != NO_QUERIER:
        reason = f"{joined} for {source}, but IGMP{querier.lower()} asks for all sources"
        return Step("join", "note", reason, "let the querier speak IGMPv3; the relay picks the source itself")
    return Step("join", "pass", f"{joined} for {source}")


def _not_joined(facts: Facts, group: str, name: str) -> str:
    most = facts.memberships_max
    limit = f" (igmp_max_memberships is {most})" if most is not None and most < 1 and not is_ipv6(group) else ""
    return f"{group} is not joined on {name}{limit}: a switch that snoops and the NIC's filter let nothing through"


def _join_remedy(facts: Facts, group: str) -> str:
    if not is_ipv6(group) and facts.memberships_max is not None and facts.memberships_max < 1:
        return "sysctl net.ipv4.igmp_max_memberships=20, then remove the rule and add it again"
    return "the log of mcrd says why joining was refused; then remove the rule and add it again"


def _unicast(facts: Facts, datagram: Datagram) -> Step:
    if any(datagram.group in (*there.addresses, *there.addresses6) for there in facts.interfaces.values()):
        return Step("join", "pass", f"{datagram.group} is an address of this host: no group to join")
    reason = f"{datagram.group} is no address of this host: only what is routed through it comes here"
    return Step("join", "note", reason, "give the rule an address of this host, or a multicast group")


def packet_filter(facts: Facts, datagram: Datagram) -> Step:
    """The ring's own filter, run by the kernel on a frame of this datagram."""
    admitted = facts.plan.admitted.get(datagram.interface, set())
    if admits(bpf.assemble(admitted), frame(datagram)):
        return Step("filter", "pass", f"the packet filter on {datagram.interface} admits {datagram.destination}")
    reason = f"the packet filter on {datagram.interface} keeps {datagram.destination} out: no counter counts it"
    return Step("filter", "stop", reason, "it is made of the rules: see there")


def frame(datagram: Datagram) -> bytes:
    """An Ethernet frame of this datagram, without payload."""
    udp = struct.pack(">HHHH", datagram.source_port or 0, datagram.port, 8, 0)
    if datagram.is_ipv6:
        ip = (
            struct.pack(">IHBB", 6 << 28, len(udp), bpf.IPPROTO_UDP, 1)
            + packed(datagram.source)
            + packed(datagram.group)
        )
        return bytes(12) + struct.pack(">H", bpf.ETH_P_IPV6) + ip + udp
    addresses = socket.inet_aton(datagram.source) + socket.inet_aton(datagram.group)
    ip = struct.pack(">BBHHHBBH", 0x45, 0, IP_UDP_HEADER_BYTES, 0, 0, 1, bpf.IPPROTO_UDP, 0) + addresses
    return bytes(12) + struct.pack(">H", bpf.ETH_P_IP) + ip + udp


def admits(program: Sequence[bpf.Instruction], raw: bytes) -> bool:
    """Whether the kernel lets a frame through a filter: that of a Unix socket, which any socket may have."""
    sender, receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with sender, receiver:
        attach_filter(receiver, program)
        receiver.setblocking(False)
        sender.setblocking(False)
        try:
            sender.send(raw)
            return receiver.recv(FRAME_BYTES_MAX) == raw
        except (BlockingIOError, PermissionError):  # a filter that rejects may be told to the sender
            return False


def worker(facts: Facts) -> Step:
    """Whether anybody reads the ring."""
    running = [worker for worker in facts.workers if worker["state"] == "running" and not worker.get("is_excluded")]
    if not running:
        return Step("worker", "stop", "no worker runs: the ring fills, then overflows", "see the log of mcrd")
    return Step("worker", "pass", f"{len(running)} of {len(facts.workers)} workers run")
