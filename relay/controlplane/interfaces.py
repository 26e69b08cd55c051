"""The names of this host's interfaces, asked over a netlink socket that is opened early.

socket.if_nameindex() opens one for each question, which the control plane may not do once it serves.
Source: man 7 rtnetlink, man 7 netlink, linux/rtnetlink.h.
"""

import itertools
import socket
import struct
from collections.abc import Iterator

NETLINK_ROUTE = 0
NLMSG_ERROR = 2
NLMSG_DONE = 3
RTM_GETLINK = 18
NLM_F_REQUEST_DUMP = 0x301  # NLM_F_REQUEST | NLM_F_ROOT | NLM_F_MATCH
IFLA_IFNAME = 3
NLMSGHDR = struct.Struct("@IHHII")  # length, type, flags, sequence number, port
IFINFOMSG = struct.Struct("@BxHiII")
RTATTR = struct.Struct("@HH")  # length, type
ANSWER_BYTES_MAX = 65_536  # the kernel fills 32 KiB at most with a part of its answer


class Interfaces:
    """Asks the kernel. Owned by one task: questions follow one another."""

    def __init__(self) -> None:
        """Raises OSError."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_ROUTE)
        self._numbers = itertools.count(1)

    def names(self) -> set[str]:
        """The interfaces that exist now. Raises OSError."""
        number = next(self._numbers)
        bytes_ = NLMSGHDR.size + IFINFOMSG.size
        request = NLMSGHDR.pack(bytes_, RTM_GETLINK, NLM_F_REQUEST_DUMP, number, 0) + IFINFOMSG.pack(0, 0, 0, 0, 0)
        self._socket.sendto(request, (0, 0))
        found: set[str] = set()
        while True:
            for kind, answered, payload in messages(self._socket.recv(ANSWER_BYTES_MAX)):
                if answered != number:  # of a question that failed
                    continue
                if kind == NLMSG_DONE:
                    return found
                if kind == NLMSG_ERROR:
                    raise OSError(-struct.unpack_from("@i", payload)[0], "the kernel does not list its interfaces")
                found.update(name_of(payload))


def messages(answer: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Type, sequence number and payload of each message in a datagram."""
    at = 0
    while at + NLMSGHDR.size <= len(answer):
        length, kind, _, number, _ = NLMSGHDR.unpack_from(answer, at)
        if length < NLMSGHDR.size:
            return
        yield kind, number, answer[at + NLMSGHDR.size : at + length]
        at += (length + 3) & ~3


def name_of(link: bytes) -> Iterator[str]:
    """The name in the payload of an RTM_NEWLINK message, once; nothing when it has none."""
    at = IFINFOMSG.size
    while at + RTATTR.size <= len(link):
        length, kind = RTATTR.unpack_from(link, at)
        if length < RTATTR.size:
            return
        if kind == IFLA_IFNAME:
            yield link[at + RTATTR.size : at + length].rstrip(b"\0").decode(errors="surrogateescape")
            return
        at += (length + 3) & ~3
