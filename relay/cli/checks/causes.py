"""What each cause of a drop means, and what helps. The causes are those of relay/dataplane/layout.py."""

import errno
import os
from dataclasses import dataclass

from relay.cli.checks.registry import Severity
from relay.dataplane.layout import DropCause


@dataclass(frozen=True)
class Meaning:
    """Of one cause."""

    severity: Severity  # when some were dropped since the start
    growing: Severity  # when some were dropped while doctor looked
    text: str
    remedy: str


MEANINGS = {
    DropCause.TRUNCATED: Meaning(
        "warning",
        "problem",
        "frames larger than a ring's slot found no room in the kernel's copy queue",
        "mcrd --num-workers N, or smaller datagrams",
    ),
    DropCause.PARSE_ERROR: Meaning(
        "warning",
        "warning",
        "their headers contradict each other or the frame's length",
        "tcpdump -vni INTERFACE udp, and look at the sender",
    ),
    DropCause.FRAGMENT: Meaning(
        "warning",
        "warning",
        "parts of a fragmented datagram never came",
        "send datagrams that fit the MTU of the whole way",
    ),
    DropCause.CHECKSUM: Meaning(
        "warning",
        "warning",
        "their IP or UDP checksum is wrong",
        "ethtool -K INTERFACE tx off at the sender, if it leaves checksums to a NIC that is not there (VM, container)",
    ),
    DropCause.NO_MATCH: Meaning(
        "note",
        "note",
        "they came to the group and port of a rule, but not from its source",
        "mcrctl explain SOURCE GROUP:PORT",
    ),
    DropCause.OWN_EGRESS: Meaning(
        "note",
        "note",
        "the relay had sent them itself",
        "let one rule have both outputs, rather than chain two rules",
    ),
    DropCause.TTL: Meaning(
        "warning",
        "warning",
        "they came with TTL 1, and an output decrements it",
        "send with a higher TTL, or give the output a fixed one: --output G:P:I:TTL",
    ),
    DropCause.EGRESS_FULL: Meaning(
        "warning",
        "problem",
        "the socket or the device's queue had no room",
        "tc -s qdisc show, and a faster link or no shaping on it",
    ),
    DropCause.SEND_ERROR: Meaning(
        "warning",
        "problem",
        "the kernel refused to send them",
        "see the errno beside",
    ),
    DropCause.RING_FULL: Meaning(
        "warning",
        "problem",
        "frames found the packet ring full: the workers were too slow, or kept from their cores",
        "mcrd --ring-mib 64, --num-workers N, or cores of their own: docs/performance.md",
    ),
    DropCause.RATE_LIMIT: Meaning(
        "warning",
        "warning",
        "they were over the limit of their rule, max_pps or max_bps",
        "mcrctl streams tells who sends them; mcrctl add-rule --replace with a higher limit, if they are wanted",
    ),
}
ERRNO_REMEDIES = {
    errno.EPERM: "a firewall forbids it: nft list ruleset",
    errno.EACCES: "a broadcast address needs SO_BROADCAST: give a multicast or unicast one",
    errno.ENETUNREACH: "there is no route: ip route add … dev INTERFACE",
    errno.EHOSTUNREACH: "nobody answers ARP for the receiver: ip neigh",
    errno.ENETDOWN: "the interface is down: ip link set INTERFACE up",
    errno.EMSGSIZE: "they are larger than an IP datagram may be on this way",
    errno.ENOBUFS: "the device's queue had no room: tc -s qdisc show",
}
ERRNO_PREFIX = "send_error_errno_"


def meaning_of(cause: str) -> Meaning:
    """Of a cause as get-stats names it. Raises KeyError for one that this version does not know."""
    if cause.startswith(ERRNO_PREFIX):
        number = int(cause.removeprefix(ERRNO_PREFIX))
        general = MEANINGS[DropCause.SEND_ERROR]
        name = errno.errorcode.get(number, str(number))
        remedy = ERRNO_REMEDIES.get(number, "man 2 sendmsg")
        return Meaning(general.severity, general.growing, f"sendmsg: {name}, {os.strerror(number)}", remedy)
    return MEANINGS[DropCause[cause.upper()]]
