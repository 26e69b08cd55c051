"""What the kernel drops behind the sockets' back: asked for once a second, told in the log.

Owned by the supervisor. A send succeeds that waits for an answer to ARP, or to IPv6's neighbour solicitation, which
never comes, that finds the queue of an interface full (unicast sockets aren't told), or that an interface without a
link throws away. No counter of an output has them; here at least the interface, or the receiver, is named.
Source: man 7 arp, linux/rtnetlink.h, linux/neighbour.h, linux/pkt_sched.h (struct tc_stats).
"""

import socket
import struct
from collections.abc import Collection, Iterator
from pathlib import Path

import psutil

from relay.addresses import ADDRESS_BYTES, is_ipv6, is_multicast, unpacked
from relay.supervisor.egress import EgressKey

ARP_TABLE = Path("/proc/net/arp")
ATF_COM = 0x02  # linux/if_arp.h: the entry has a hardware address
LOOKS_UNANSWERED = 2  # an answer takes a moment: what one look finds may be about to come
LINES_MAX = 20  # of each kind, a look
RTM_NEWNEIGH = 28
RTM_GETNEIGH = 30
NDMSG = struct.Struct("=B3xiHBB")  # family, ifindex, state, flags, type
NDA_DST = 1
NUD_UNANSWERED = 0x01 | 0x20  # NUD_INCOMPLETE, NUD_FAILED
RTM_NEWQDISC = 36
RTM_GETQDISC = 38
NLM_F_REQUEST_DUMP = 0x301
NLMSG_ERROR = 2
NLMSG_DONE = 3
NLMSG_HEADER = struct.Struct("=IHHII")
TCMSG = struct.Struct("=B3xiIII")
TCA_STATS = 3
TC_STATS_DROPS_OFFSET = 12
TC_H_ROOT = 0xFFFF_FFFF
ANSWER_BYTES_MAX = 65_536
ANSWER_S_MAX = 0.5

Receiver = tuple[str, str]  # address, interface


def parse_unanswered(arp_table: str) -> set[Receiver]:
    """Who was asked for and has not answered, of the text of /proc/net/arp."""
    rows = (line.split() for line in arp_table.splitlines()[1:])
    return {(row[0], row[-1]) for row in rows if len(row) == 6 and not int(row[2], 16) & ATF_COM}


def parse_queue_drops(answer: bytes) -> tuple[dict[int, int], bool]:
    """Drops of root queues by ifindex, of one netlink answer, and whether it was the last."""
    drops: dict[int, int] = {}
    messages, is_last = _messages(answer, RTM_NEWQDISC, TCMSG)
    for (_, ifindex, _, parent, _), attributes in messages:
        if parent == TC_H_ROOT:
            statistics = _attribute(attributes, TCA_STATS)
            if len(statistics) >= TC_STATS_DROPS_OFFSET + 4:
                (dropped,) = struct.unpack_from("=I", statistics, TC_STATS_DROPS_OFFSET)
                drops[ifindex] = drops.get(ifindex, 0) + dropped
    return drops, is_last


def parse_unanswered_ipv6(answer: bytes) -> tuple[set[tuple[str, int]], bool]:
    """Who of IPv6 was asked for and has not answered, address and ifindex, and whether it was the last answer."""
    found: set[tuple[str, int]] = set()
    messages, is_last = _messages(answer, RTM_NEWNEIGH, NDMSG)
    for (_, ifindex, state, _, _), attributes in messages:
        address = _attribute(attributes, NDA_DST)
        if state & NUD_UNANSWERED and len(address) == ADDRESS_BYTES:
            found.add((unpacked(address), ifindex))
    return found, is_last


def _messages(answer: bytes, wanted: int, head: struct.Struct) -> tuple[list[tuple[tuple[int, ...], bytes]], bool]:
    """The messages of one kind, each as its struct and its attributes, and whether the dump ends with this answer."""
    found: list[tuple[tuple[int, ...], bytes]] = []
    at = 0
    while at + NLMSG_HEADER.size <= len(answer):
        length, kind, _, _, _ = NLMSG_HEADER.unpack_from(answer, at)
        if kind in (NLMSG_DONE, NLMSG_ERROR) or not NLMSG_HEADER.size <= length <= len(answer) - at:
            return found, True
        if kind == wanted and length >= NLMSG_HEADER.size + head.size:
            begin = at + NLMSG_HEADER.size
            found.append((head.unpack_from(answer, begin), answer[begin + head.size : at + length]))
        at += -(-length // 4) * 4
    return found, False


def _attribute(attributes: bytes, wanted: int) -> bytes:
    """What is in the first attribute of a kind, b"" without one."""
    at = 0
    while at + 4 <= len(attributes):
        length, kind = struct.unpack_from("=HH", attributes, at)
        if kind == wanted:
            return attributes[at + 4 : at + length]
        at += max(-(-length // 4) * 4, 4)
    return b""


def queue_drops() -> dict[int, int]:
    """What the queue of each interface has dropped, by ifindex. Raises OSError."""
    drops: dict[int, int] = {}
    for answer in _dump(RTM_GETQDISC, TCMSG.pack(0, 0, 0, 0, 0)):
        some, is_last = parse_queue_drops(answer)
        drops |= some
        if is_last:
            break
    return drops


def unanswered_ipv6() -> set[tuple[str, int]]:
    """Who of IPv6 was asked for and has not answered, by address and ifindex. Raises OSError."""
    found: set[tuple[str, int]] = set()
    for answer in _dump(RTM_GETNEIGH, NDMSG.pack(socket.AF_INET6, 0, 0, 0, 0)):
        some, is_last = parse_unanswered_ipv6(answer)
        found |= some
        if is_last:
            break
    return found


def _dump(kind: int, body: bytes) -> Iterator[bytes]:
    """The answers to a dump, until the caller has seen the last. Raises OSError."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as netlink:
        netlink.settimeout(ANSWER_S_MAX)
        length = NLMSG_HEADER.size + len(body)
        netlink.sendto(NLMSG_HEADER.pack(length, kind, NLM_F_REQUEST_DUMP, 1, 0) + body, (0, 0))
        while True:
            yield netlink.recv(ANSWER_BYTES_MAX)


class EgressWatch:
    """What was found at the last look, and what was told."""

    def __init__(self) -> None:
        self._looks: dict[Receiver, int] = {}  # unanswered so often in a row
        self._told: set[Receiver] = set()
        self._drops: dict[tuple[int, str], int] = {}
        self._generation = -1
        self._receivers: set[Receiver] = set()
        self._interfaces: set[tuple[int, str]] = set()

    def look(self, generation: int, keys: Collection[EgressKey]) -> Iterator[str]:
        """Warnings about what is new since the last look. `keys` are those of this generation of rules."""
        if generation != self._generation:
            self._generation = generation
            self._receivers = {(key.group, key.interface) for key in keys if not is_multicast(key.group)}
            self._interfaces = {(key.ifindex, key.interface) for key in keys}
        yield from _at_most(self._unanswered(), "receivers that do not answer, or do again")
        yield from _at_most(self._dropped(), "interfaces that dropped frames")

    def _unanswered(self) -> list[str]:
        found: set[Receiver] = set()
        if self._receivers:
            try:
                found = self._asked_in_vain() & self._receivers
            except OSError:
                return []
        self._looks = {receiver: self._looks.get(receiver, 0) + 1 for receiver in found}
        silent = {receiver for receiver, looks in self._looks.items() if looks >= LOOKS_UNANSWERED}
        lines = [
            f"No {'neighbour' if is_ipv6(address) else 'ARP'} answer from {address} on {interface}: "
            "what is sent there is lost, and counted as relayed"
            for address, interface in sorted(silent - self._told)
        ]
        back = self._told - found
        lines += [f"{address} on {interface} is looked for no more, or answers" for address, interface in sorted(back)]
        self._told = (self._told | silent) - back
        return lines

    def _asked_in_vain(self) -> set[Receiver]:
        """Those of both families, as far as there are receivers of them. Raises OSError."""
        found: set[Receiver] = set()
        if not all(is_ipv6(address) for address, _ in self._receivers):
            found |= parse_unanswered(ARP_TABLE.read_text())
        if any(is_ipv6(address) for address, _ in self._receivers):
            names = dict(self._interfaces)
            found |= {(address, names[ifindex]) for address, ifindex in unanswered_ipv6() if ifindex in names}
        return found

    def _dropped(self) -> list[str]:
        if not self._interfaces:
            self._drops = {}
            return []
        try:
            queues, devices = queue_drops(), psutil.net_io_counters(pernic=True, nowrap=False)
        except OSError:
            return []
        drops = {
            (index, name): queues.get(index, 0) + (devices[name].dropout if name in devices else 0)
            for index, name in self._interfaces
        }
        former, self._drops = self._drops, drops
        lines = []
        for interface, total in sorted(drops.items()):
            before = former.get(interface, total)
            new = total - before if total >= before else total  # a new queue counts from 0
            if new:
                lines.append(f"Interface {interface[1]} dropped {new} outgoing frames: its queue was full, or no link")
        return lines


def _at_most(lines: list[str], what: str) -> Iterator[str]:
    yield from lines[:LINES_MAX]
    if len(lines) > LINES_MAX:
        yield f"{len(lines) - LINES_MAX} more {what}"
