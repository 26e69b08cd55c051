"""The running relay as a diagnosis sees it: what it answers, whose process it is, and the network that it is in.

Everybody may ask; root also sees the supervisor's files in /proc, and goes over to the relay's network namespace, as
its interfaces, memberships and settings are those that count.
"""

import contextlib
import ctypes
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from relay import api
from relay.cli.host import Files
from relay.cli.options import tell_silence
from relay.client import Client
from relay.credentials import peer_of
from relay.errors import ControlError
from relay.rules import Rule

CLONE_NEWNS = 0x00020000  # linux/sched.h
CLONE_NEWNET = 0x40000000
MS_REC_SLAVE = 0x4000 | (1 << 19)  # MS_REC | MS_SLAVE, linux/mount.h
ANSWER_S_MAX = 5.0  # a relay whose supervisor is gone answers nothing until the next one serves
SEGMENT = re.compile(r"/dev/shm/mcr_(?:(?P<instance>\S+)_)?supervisor$", re.MULTILINE)


@dataclass(frozen=True)
class Running:
    """What a relay said of itself at one moment."""

    pid: int  # of the supervisor; 0 when it can't be told, as from another pid namespace
    instance: str | None
    has_private_view: bool  # its files in /proc may be read
    version: str
    interfaces: tuple[str, ...]  # where rules without an input interface listen
    rules: tuple[Rule, ...]
    states: Mapping[str, str]  # by rule id
    stats: Any  # as get-stats --json has it


def ask(path: Path, files: Files) -> Running:
    """Ask the relay behind a control socket. Raises UnreachableError, ControlError."""
    with Client(path, ANSWER_S_MAX, on_silence=tell_silence) as client:
        pong = client.ask(api.Ping()).result
        listed = client.ask(api.ListRules()).result
        stats = client.ask(api.GetStats()).result
    if "interfaces" not in pong:
        restart = "`mcrctl restart --graceful` starts the one that is installed, without a loss"
        raise ControlError(f"the relay is an older version, {pong['version']}, which does not tell enough: {restart}")
    pid = _listener(path)
    maps = files.text(f"proc/{pid}/maps") if pid else None
    segment = SEGMENT.search(maps) if maps else None
    rules = tuple(
        msgspec.convert({name: rule[name] for name in Rule.__struct_fields__ if name in rule}, Rule) for rule in listed
    )
    return Running(
        pid=pid if segment or not maps else 0,
        instance=segment["instance"] if segment else None,
        has_private_view=segment is not None,
        version=pong["version"],
        interfaces=tuple(pong["interfaces"]),
        rules=rules,
        states={rule["rule_id"]: rule["state"] for rule in listed},
        stats=stats,
    )


def _listener(path: Path) -> int:
    """Who called listen(2) there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, contextlib.suppress(OSError):
        probe.connect(str(path))
        return peer_of(probe)[0]
    return 0


def enter_network_of(pid: int) -> str | None:
    """Go over to the network namespace of a process, /sys with it, for good; return why that was not possible."""
    if not pid:
        return "the relay's process can't be seen from here: this network namespace is shown, which may be another"
    try:
        there = Path(f"/proc/{pid}/ns/net")
        if there.samefile("/proc/self/ns/net"):
            return None
        libc = ctypes.CDLL(None, use_errno=True)
        with there.open() as namespace:
            _check(libc.setns(namespace.fileno(), CLONE_NEWNET))
        _check(libc.unshare(CLONE_NEWNS))
        _check(libc.mount(b"none", b"/", None, MS_REC_SLAVE, None))
        _check(libc.mount(b"sysfs", b"/sys", b"sysfs", 0, None))  # its interfaces are those of who mounts it
    except OSError as error:
        return f"the relay's network namespace may not be looked at ({error.strerror}): this one's is shown; use sudo"
    return None


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def socket_inodes(pid: int) -> set[int] | None:
    """The sockets that a process has open, None when that may not be looked at."""
    inodes = set()
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                kind, _, number = str(entry.readlink()).partition(":[")
                if kind == "socket":
                    inodes.add(int(number.rstrip("]")))
    except OSError:
        return None
    return inodes
