"""Capabilities: which a process keeps, and how it gives up the others for good.

Source: man 7 capabilities, man 2 capset, linux/capability.h.
"""

import contextlib
import ctypes
import os
from collections.abc import Collection, Iterator
from enum import IntEnum
from pathlib import Path

_LINUX_CAPABILITY_VERSION_3 = 0x2008_0522
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
PR_CAP_AMBIENT_CLEAR_ALL = 4
LAST_CAP = Path("/proc/sys/kernel/cap_last_cap")


class Capability(IntEnum):
    """linux/capability.h: those that any part of the relay ever needs."""

    CAP_CHOWN = 0  # segments belong to the workers' user
    CAP_DAC_OVERRIDE = 1  # code, log files and segments wherever they lie
    CAP_KILL = 5  # children run as another user
    CAP_SETGID = 6
    CAP_SETUID = 7
    CAP_SETPCAP = 8  # children empty their bounding set
    CAP_NET_BIND_SERVICE = 10  # unicast inputs below port 1024
    CAP_NET_ADMIN = 12  # IP_TRANSPARENT, SO_RCVBUFFORCE, SO_SNDBUFFORCE, nftables
    CAP_NET_RAW = 13  # packet sockets, SO_BINDTODEVICE
    CAP_SYS_PTRACE = 19  # at start: who has a segment open
    CAP_SYS_NICE = 23  # at the template's start: workers go before others on their core
    CAP_SYS_RESOURCE = 24  # at start: more descriptors


# What the supervisor needs for sockets and children later.
SUPERVISOR = frozenset(
    {
        Capability.CAP_CHOWN,
        Capability.CAP_DAC_OVERRIDE,
        Capability.CAP_KILL,
        Capability.CAP_SETGID,
        Capability.CAP_SETUID,
        Capability.CAP_SETPCAP,
        Capability.CAP_NET_BIND_SERVICE,
        Capability.CAP_NET_ADMIN,
        Capability.CAP_NET_RAW,
    }
)
# What it may have again when it starts anew.
AT_START = SUPERVISOR | {Capability.CAP_SYS_NICE, Capability.CAP_SYS_PTRACE, Capability.CAP_SYS_RESOURCE}


class UserCapHeader(ctypes.Structure):
    """struct __user_cap_header_struct."""

    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class UserCapData(ctypes.Structure):
    """struct __user_cap_data_struct: 32 capabilities of each set."""

    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


_libc = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, *arguments: int) -> int:
    """man 2 prctl. Raises OSError."""
    padded = [*arguments, 0, 0, 0, 0][:4]
    result = int(_libc.prctl(option, *(ctypes.c_ulong(argument) for argument in padded)))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _capabilities(call: str, data: ctypes.Array[UserCapData]) -> None:
    header = UserCapHeader(_LINUX_CAPABILITY_VERSION_3, 0)
    if getattr(_libc, call)(ctypes.byref(header), data):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def permitted() -> int:
    """The permitted set of this process, a bit for each capability."""
    data = (UserCapData * 2)()
    _capabilities("capget", data)
    return int(data[0].permitted | data[1].permitted << 32)


def _set(permitted: int, inheritable: int) -> None:
    low, high = permitted & 0xFFFF_FFFF, permitted >> 32
    data = (UserCapData * 2)(
        UserCapData(low, low, inheritable & 0xFFFF_FFFF), UserCapData(high, high, inheritable >> 32)
    )
    _capabilities("capset", data)


def pass_on() -> None:
    """Let the program that this thread executes next have what is permitted now. Raises OSError.

    Root's program gets that anyway. One of another user, as a service with AmbientCapabilities, would get nothing.
    """
    if os.geteuid() == 0:
        return
    mask = permitted()
    with contextlib.suppress(PermissionError):  # forbidden, see keep_only: then nobody has emptied the inheritable set
        _set(mask, mask)
    for capability in range(mask.bit_length()):
        if mask >> capability & 1:
            prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability)


@contextlib.contextmanager
def passed_on() -> Iterator[None]:
    """In the block, programs that this thread starts get what is permitted now; after it, none of it."""
    pass_on()
    try:
        yield
    finally:
        keep_only(range(64))


def keep_only(kept: Collection[int]) -> None:
    """Reduce the effective and permitted sets to `kept`, and empty the inheritable and ambient ones. Raises OSError.

    A service manager may forbid capset(2). If no more is permitted already, that leaves an inheritable set, by which
    no program without file capabilities gets anything.
    """
    mask = permitted() & sum(1 << capability for capability in kept)
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    try:
        _set(mask, 0)
    except PermissionError:
        if permitted() != mask:
            raise


def bound_to(kept: Collection[int]) -> None:
    """Take all but `kept` from what this process and its children can ever have. Raises OSError.

    Without CAP_SETPCAP the set stays as it is: what is not permitted can't be had back by a process that sets
    PR_SET_NO_NEW_PRIVS.
    """
    if not permitted() & 1 << Capability.CAP_SETPCAP:
        return
    for capability in range(int(LAST_CAP.read_text()) + 1):
        if capability not in kept and prctl(PR_CAPBSET_READ, capability):
            prctl(PR_CAPBSET_DROP, capability)
