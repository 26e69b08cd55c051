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
from collections.abc import Sequence

from relay.cli.checks.ethtool import offloads
from relay.cli.checks.situation import Probes
from relay.cli.host import Files
from relay.cli.running import Running
from relay.errors import PreflightError
from relay.preflight import check_io_uring
from relay.privileges import resolve_user

IP_PKTINFO = 8
IGMP_HOST_MEMBERSHIP_QUERY = 0x11  # linux/igmp.h
PKTINFO = struct.Struct("@i4s4s")  # struct in_pktinfo
TIME_ERROR = 5  # sys/timex.h: the clock is not synchronised
TIMEX_BYTES = 256  # struct timex has 208
NFT_S_MAX = 5.0
NFT_TABLE = re.compile(r"^table netdev (mcr\S*) \{(.*?)^\}", re.MULTILINE | re.DOTALL)
NFT_DEVICE = re.compile(r'hook ingress device "([^"]+)"')


def probe(relay: Running | None, interfaces: Sequence[str], queriers: dict[str, str] | None) -> Probes:
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
        queriers=queriers,
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


def hear_queriers(seconds: float) -> dict[str, str] | None:
    """Wait so long, and return whose IGMP queries came in meanwhile, by interface; None without privileges."""
    try:
        sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_IGMP)
    except PermissionError:
        time.sleep(seconds)
        return None
    heard: dict[str, str] = {}
    with sock:
        sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
        deadline_s = time.monotonic() + seconds
        while (left_s := deadline_s - time.monotonic()) > 0:
            if not select.select([sock], [], [], left_s)[0]:
                break
            packet, control, _, (source, _) = sock.recvmsg(256, 64)
            header_bytes = (packet[0] & 0xF) * 4
            if packet[header_bytes : header_bytes + 1] != bytes([IGMP_HOST_MEMBERSHIP_QUERY]):
                continue
            for _, kind, data in control:
                if kind == IP_PKTINFO:
                    with contextlib.suppress(OSError):  # gone since
                        heard[socket.if_indextoname(PKTINFO.unpack_from(data)[0])] = source
    return heard
