"""What no file tells: asked of the kernel by system calls, of nftables, of the log rings. Nothing is changed by it.

What may not be asked, as without root, is None.
"""

import contextlib
import ctypes
import os
import re
import select
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from relay.cli.checks.ethtool import offloads
from relay.cli.checks.situation import Probes
from relay.cli.host import Files
from relay.cli.running import Running
from relay.errors import PreflightError
from relay.preflight import check_io_uring
from relay.privileges import resolve_user

IP_PKTINFO = 8
IPV6_RECVPKTINFO, IPV6_PKTINFO = 49, 50  # linux/in6.h
ICMPV6_FILTER = 1  # linux/icmpv6.h: a bit for each type that is not wanted
ICMPV6_MGM_QUERY = 130
IGMP_HOST_MEMBERSHIP_QUERY = 0x11  # linux/igmp.h
PKTINFO = struct.Struct("@i4s4s")  # struct in_pktinfo
PKTINFO6 = struct.Struct("@16si")  # struct in6_pktinfo
TIME_ERROR = 5  # sys/timex.h: the clock is not synchronised
TIMEX_BYTES = 256  # struct timex has 208
NFT_S_MAX = 5.0
NFT_TABLE = re.compile(r"^table netdev (mcr\S*) \{(.*?)^\}", re.MULTILINE | re.DOTALL)
NFT_DEVICE = re.compile(r'hook ingress device "([^"]+)"')


class Queriers(NamedTuple):
    """Whose queries came in, by interface; None without privileges."""

    igmp: dict[str, str] | None
    mld: dict[str, str] | None


def probe(relay: Running | None, interfaces: Sequence[str], queriers: Queriers) -> Probes:
    """Everything now; `queriers` are those that were heard meanwhile."""
    used = None
    if relay is not None and relay.has_private_view:
        used = len(Files().names(f"proc/{relay.pid}/fd")) or None
    return Probes(
        io_uring_refusal=io_uring_refusal(),
        clock_is_synchronised=clock_is_synchronised(),
        shm_free_bytes=shm_free_bytes(),
        descriptors_used=used,
        offloads={name: offloads(name) for name in interfaces},
        queriers=queriers.igmp,
        mld_queriers=queriers.mld,
        exclusive={name: table for name, table in exclusive().items() if name in interfaces},
        log_dropped=log_dropped(relay) if relay is not None and relay.has_private_view else None,
    )


def io_uring_refusal() -> str | None:
    """Why a worker could have no io_uring, None when it could."""
    try:
        check_io_uring(resolve_user(None, None), 1)
    except PreflightError as error:
        return str(error)
    return None


def clock_is_synchronised() -> bool | None:
    """By the kernel's word, man 2 adjtimex; None when it may not be asked."""
    state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(TIMEX_BYTES))
    return None if state < 0 else state != TIME_ERROR


def shm_free_bytes() -> int | None:
    """The space left in /dev/shm."""
    try:
        status = os.statvfs("/dev/shm")
    except OSError:
        return None
    return status.f_bavail * status.f_frsize


def exclusive() -> dict[str, str]:
    """The relays' nftables tables that keep datagrams from the host, by interface; {} where it can't be told."""
    if os.geteuid() != 0 or shutil.which("nft") is None:
        return {}
    command = ["nft", "list", "ruleset", "netdev"]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, timeout=NFT_S_MAX, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return {name: table for table, body in NFT_TABLE.findall(listing) for name in NFT_DEVICE.findall(body)}


def log_dropped(relay: Running) -> dict[str, int]:
    """The log records that found their ring full, by segment of this relay."""
    from logging_shm.cli.choose import NO_INSTANCE, Rings

    rings = (ring.segment for ring in Rings(instance=relay.instance).now())
    return {
        segment.name: sum(segment.dropped())
        for segment in rings
        if relay.instance is not None or NO_INSTANCE.fullmatch(segment.name)
    }


def hear_queriers(seconds: float) -> Queriers:
    """Wait so long, and return whose queries of IGMP and MLD came in meanwhile."""
    with contextlib.ExitStack() as stack:
        opened = [_listener(open_socket) for open_socket in (_igmp_socket, _mld_socket)]
        heard: dict[socket.socket, dict[str, str]] = {stack.enter_context(sock): {} for sock in opened if sock}
        deadline_s = time.monotonic() + seconds
        while (left_s := deadline_s - time.monotonic()) > 0:
            for sock in select.select(list(heard), [], [], left_s)[0]:
                heard[sock] |= _igmp_querier(sock) if sock.family == socket.AF_INET else _mld_querier(sock)
        igmp, mld = (heard[sock] if sock else None for sock in opened)
        return Queriers(igmp, mld)


def _listener(open_socket: Callable[[], socket.socket]) -> socket.socket | None:
    """A raw socket, None without privileges, or without IPv6."""
    try:
        return open_socket()
    except OSError:
        return None


def _igmp_socket() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_IGMP)
    sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
    return sock


def _mld_socket() -> socket.socket:
    sock = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
    sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVPKTINFO, 1)
    words = [0xFFFF_FFFF] * 8
    words[ICMPV6_MGM_QUERY >> 5] &= ~(1 << (ICMPV6_MGM_QUERY & 31))
    sock.setsockopt(socket.IPPROTO_ICMPV6, ICMPV6_FILTER, struct.pack("=8I", *words))
    return sock


def _igmp_querier(sock: socket.socket) -> dict[str, str]:
    """The interface and the source of a query that waits; {} when it is something else."""
    packet, control, _, (source, _) = sock.recvmsg(256, 64)
    header_bytes = (packet[0] & 0xF) * 4
    if packet[header_bytes : header_bytes + 1] != bytes([IGMP_HOST_MEMBERSHIP_QUERY]):
        return {}
    return _named({PKTINFO.unpack_from(data)[0]: source for _, kind, data in control if kind == IP_PKTINFO})


def _mld_querier(sock: socket.socket) -> dict[str, str]:
    """The same of MLD: the filter lets in nothing else."""
    _, control, _, (source, *_) = sock.recvmsg(256, 64)
    found = {PKTINFO6.unpack_from(data)[1]: source for _, kind, data in control if kind == IPV6_PKTINFO}
    return _named({ifindex: address.partition("%")[0] for ifindex, address in found.items()})


def _named(by_index: dict[int, str]) -> dict[str, str]:
    """By the interfaces' names, as far as they still are there."""
    named = {}
    for ifindex, source in by_index.items():
        with contextlib.suppress(OSError):
            named[socket.if_indextoname(ifindex)] = source
    return named
