"""The host as the kernel's files show it: what explain and doctor read, below a root folder that tests can make.

Only reads. What is missing or may not be read is None, never an error: a diagnosis goes on without it.
Source: man 5 proc, net/ipv4/igmp.c (igmp_mc_seq_show, igmp_mcf_seq_show), net/ipv6/mcast.c (igmp6_mc_seq_show,
igmp6_mcf_seq_show), net/core/net-procfs.c (softnet_seq_show).
"""

import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from relay.addresses import unpacked

NO_QUERIER = "V3"  # as the kernel writes it where it has heard none
IFF_UP = 0x1  # linux/if.h
IFF_LOOPBACK = 0x8
IFF_MULTICAST = 0x1000
SOFTNET_DROPPED, SOFTNET_SQUEEZED, SOFTNET_CPU = 1, 2, 12  # columns


class Files:
    """Files below `root`, by their paths without the leading slash."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root

    def text(self, path: str) -> str | None:
        """What a file has, without the newline at its end."""
        try:
            return (self.root / path).read_text(errors="replace").rstrip("\n")
        except OSError:
            return None

    def number(self, path: str) -> int | None:
        """The decimal or 0x number that a file has."""
        text = self.text(path)
        try:
            return int(text, 0) if text else None
        except ValueError:
            return None

    def find(self, pattern: str) -> list[str]:
        """The paths that match, sorted."""
        try:
            return sorted(str(path.relative_to(self.root)) for path in self.root.glob(pattern))
        except OSError:
            return []

    def names(self, path: str) -> list[str]:
        """The names in a folder, sorted."""
        try:
            return sorted(entry.name for entry in (self.root / path).iterdir())
        except OSError:
            return []

    def setting(self, key: str) -> int | None:
        """A number of /proc/sys, by its key with dots or slashes."""
        return self.number(f"proc/sys/{key}")

    def interface(self, name: str, attribute: str) -> int | None:
        """A number of /sys/class/net: flags, mtu, carrier …"""
        return self.number(f"sys/class/net/{name}/{attribute}")


@dataclass
class Joined:
    """The groups of an interface, IPv4 and IPv6, from /proc/net/igmp and igmp6."""

    ifindex: int
    name: str
    querier: str  # of IGMP; V1, V2: heard lately; V3: either heard or none at all
    groups: dict[str, int] = field(default_factory=dict)  # how many sockets joined


def joined(text: str, text6: str = "") -> dict[str, Joined]:
    """/proc/net/igmp and /proc/net/igmp6 by interface name."""
    interfaces: dict[str, Joined] = {}
    current: Joined | None = None
    for line in text.splitlines()[1:]:
        words = line.split()
        if line[:1].isdigit() and len(words) >= 3:
            index, rest = line.split(maxsplit=1)
            name, _, counts = rest.partition(":")
            current = Joined(int(index), name.strip(), counts.split()[-1])
            interfaces[current.name] = current
        elif current is not None and len(words) >= 2:
            # %08X of a big-endian number as this machine has it
            current.groups[socket.inet_ntoa(struct.pack("=I", int(words[0], 16)))] = int(words[1])
    for line in text6.splitlines():
        words = line.split()
        if len(words) == 6:
            there = interfaces.setdefault(words[1], Joined(int(words[0]), words[1], NO_QUERIER))
            there.groups[unpacked(bytes.fromhex(words[2]))] = int(words[3])
    return interfaces


SourceFilters = dict[int, dict[str, dict[str, int]]]


def source_filters(text: str) -> SourceFilters:
    """/proc/net/mcfilter or mcfilter6: sources that sockets asked for, with their number, by ifindex and group.

    The kernel begins with the first interface whose newest group has sources: of the others before it nothing is known.
    """
    filters: SourceFilters = {}
    for line in text.splitlines()[1:]:
        words = line.split()
        if len(words) == 6:
            group, source = map(_filtered, words[2:4])
            filters.setdefault(int(words[0]), {}).setdefault(group, {})[source] = int(words[4])
    return filters


def _filtered(word: str) -> str:
    if word.startswith("0x"):
        return socket.inet_ntoa(struct.pack(">I", int(word, 16)))
    return unpacked(bytes.fromhex(word))


@dataclass(frozen=True)
class UdpSocket:
    """A line of /proc/net/udp or udp6."""

    local: tuple[str, int]
    remote: tuple[str, int]
    inode: int


def udp_sockets(text: str) -> Iterator[UdpSocket]:
    """/proc/net/udp or udp6."""
    for line in text.splitlines()[1:]:
        words = line.split()
        if len(words) >= 10:
            local, remote = (_endpoint(word) for word in words[1:3])
            yield UdpSocket(local, remote, int(words[9]))


def _endpoint(word: str) -> tuple[str, int]:
    address, _, port = word.partition(":")
    # each word as this machine has it
    raw = b"".join(struct.pack("=I", int(address[at : at + 8], 16)) for at in range(0, len(address), 8))
    return socket.inet_ntoa(raw) if len(raw) == 4 else unpacked(raw), int(port, 16)


def statistics(text: str, group: str) -> dict[str, int]:
    """/proc/net/netstat or snmp: the counters of a group, such as TcpExt, by name."""
    lines = [line.split()[1:] for line in text.splitlines() if line.startswith(f"{group}:")]
    return dict(zip(lines[0], map(int, lines[1]), strict=False)) if len(lines) == 2 else {}


def softnet(text: str) -> dict[int, tuple[int, int]]:
    """/proc/net/softnet_stat: packets dropped and times squeezed, by CPU."""
    counts = {}
    for line_number, line in enumerate(text.splitlines()):
        words = [int(word, 16) for word in line.split()]
        cpu = words[SOFTNET_CPU] if len(words) > SOFTNET_CPU else line_number
        counts[cpu] = words[SOFTNET_DROPPED], words[SOFTNET_SQUEEZED]
    return counts


def cpu_list(text: str) -> set[int]:
    """CPUs from the kernel's lists, such as 0-3,8."""
    cpus: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if first.isdigit():
            cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def limits(text: str) -> dict[str, tuple[str, str]]:
    """/proc/PID/limits: soft and hard limit by name."""
    found = {}
    for line in text.splitlines()[1:]:
        words = line[26:].split()
        if len(words) >= 2:
            found[line[:26].strip()] = words[0], words[1]
    return found
