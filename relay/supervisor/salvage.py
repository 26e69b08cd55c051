"""Salvage: what is missing of what was kept is taken from the workers that run, which have it open.

A template that dies while no supervisor runs takes along what it kept. A worker has the same packet rings, counters and
copy arena open; the next supervisor duplicates those descriptors with pidfd_getfd(2), which needs CAP_SYS_PTRACE over
processes of another user, and Yama's consent (kernel.yama.ptrace_scope below 3). A worker is less privileged, so each
descriptor is looked at before it is used. Memberships and the control socket are nowhere else: they are opened anew.
"""

import contextlib
import ctypes
import os
import socket
import stat
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from relay.dataplane import layout
from relay.dataplane.copies import Copies
from relay.supervisor.ingress import PACKET_FANOUT, SOL_PACKET

SYS_PIDFD_GETFD = 438  # asm-generic/unistd.h, and every machine's own

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Bound:
    """What a ring's socket is known by: its interface, and its fanout group."""

    interface: str
    ifindex: int
    fanout_id: int


@dataclass
class Salvaged:
    """What a worker had open. The caller owns it."""

    sockets: dict[Bound, socket.socket] = field(default_factory=dict)
    stats: int | None = None  # the descriptor of its counters
    copies: Copies | None = None


def salvage(pidfd: int, pid: int, core: int, rings: Collection[Bound]) -> Salvaged:
    """Take from a worker that `pidfd` holds what it reads its rings with.

    What it has not, or twice, is left out: of two sockets on one interface nobody knows which the worker reads. Raises
    OSError: PermissionError where it may not be done.
    """
    found: dict[Bound, dict[int, socket.socket]] = {}  # by inode: a mapping has a descriptor of its own
    salvaged = Salvaged()
    for descriptor in _duplicates(pidfd, pid):
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISSOCK(mode):
            sock = socket.socket(fileno=descriptor)
            bound = _bound(sock)
            inode = os.fstat(descriptor).st_ino
            if bound is not None and bound in rings and inode not in found.setdefault(bound, {}):
                found[bound][inode] = sock
            else:
                sock.close()
        elif salvaged.stats is None and _is_stats(descriptor, mode, pid, core):
            salvaged.stats = descriptor
        elif salvaged.copies is None and _is_copies(descriptor, mode):
            salvaged.copies = Copies(descriptor)
        else:
            os.close(descriptor)
    for bound, sockets in found.items():
        if len(sockets) == 1:
            salvaged.sockets[bound] = sockets.popitem()[1]
        for sock in sockets.values():
            sock.close()
    return salvaged


def _duplicates(pidfd: int, pid: int) -> Iterator[int]:
    """Each socket and file of a process, duplicated. Raises PermissionError; ends early when the process ends."""
    folder = Path(f"/proc/{pid}/fd")
    try:
        names = sorted(int(entry.name) for entry in folder.iterdir())
    except FileNotFoundError:
        return
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            if not str((folder / str(name)).readlink()).startswith(("socket:", "/")):
                continue  # io_uring for one
        descriptor = int(_libc.syscall(SYS_PIDFD_GETFD, pidfd, name, 0))
        if descriptor >= 0:
            yield descriptor
            continue
        error = OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        if isinstance(error, PermissionError):
            raise error
        # Closed meanwhile, or the process has ended.


def _bound(sock: socket.socket) -> Bound | None:
    """What a packet socket is bound to; None of another, and of one whose interface is gone."""
    if (sock.family, sock.type) != (socket.AF_PACKET, socket.SOCK_RAW):
        return None
    name = sock.getsockname()[0]
    try:
        (fanout,) = struct.unpack("@I", sock.getsockopt(SOL_PACKET, PACKET_FANOUT, 4))
        return Bound(name, socket.if_nametoindex(name), fanout & 0xFFFF)
    except OSError:
        return None


def _is_stats(descriptor: int, mode: int, pid: int, core: int) -> bool:
    """Whether a file is the worker's stats segment, which names it. By its own name a later one may be found."""
    if not stat.S_ISREG(mode):
        return False
    try:
        header = os.pread(descriptor, layout.STATS_HEADER.itemsize, 0)
    except OSError:  # a log, open for writing
        return False
    if len(header) < layout.STATS_HEADER.itemsize:
        return False
    read = np.frombuffer(header, layout.STATS_HEADER)[0]
    return (int(read["magic"]), int(read["core"]), int(read["pid"])) == (layout.STATS_MAGIC, core, pid)


def _is_copies(descriptor: int, mode: int) -> bool:
    if not stat.S_ISREG(mode):
        return False
    try:
        return Copies.is_one(descriptor)
    except OSError:
        return False
