"""Network namespaces for tests, demo and benchmarks: hosts joined by cables, on one machine, gone afterwards.

    gen ──── relay ──── sink          with Line(): two cables, three hosts
     10.1.0.1   10.1.0.2 10.2.0.1   10.2.0.2
     fd00:1::1  fd00:1::2 fd00:2::1  fd00:2::2

IPv6 addresses are usable at once: nobody looks for duplicates on these links.
Needs root and iproute2. Names carry the process id, so that several run side by side.
"""

import contextlib
import ctypes
import itertools
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

CLONE_NEWNET = 0x40000000  # linux/sched.h
NO_DUPLICATE_ADDRESS_DETECTION = Path("/proc/sys/net/ipv6/conf/default/accept_dad")
_serial = itertools.count(1)


def ip(*arguments: str) -> None:
    """Run `ip`. Raises RuntimeError with what it printed."""
    result = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {result.stderr.strip()}")


def _setns(descriptor: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@contextlib.contextmanager
def enter_namespace(path: Path) -> Iterator[None]:
    """Let the calling thread be in the namespace: a socket that it opens stays there. man 2 setns."""
    with Path("/proc/thread-self/ns/net").open() as home, path.open() as there:
        _setns(there.fileno())
        try:
            yield
        finally:
            _setns(home.fileno())


class Host:
    """A network namespace with its loopback up; a context manager."""

    def __init__(self, name: str) -> None:
        self.namespace = f"mcr{os.getpid()}-{next(_serial)}-{name}"
        ip("netns", "add", self.namespace)
        with contextlib.suppress(FileNotFoundError), self.inside():  # a kernel without IPv6
            NO_DUPLICATE_ADDRESS_DETECTION.write_text("0")  # else link-local addresses need a second, too
        self.ip("link", "set", "lo", "up")

    def ip(self, *arguments: str) -> None:
        """Run `ip` in this namespace."""
        ip("-n", self.namespace, *arguments)

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The command line that runs `arguments` in this namespace."""
        return ["ip", "netns", "exec", self.namespace, *arguments]

    def popen(self, arguments: Sequence[str], **options: Any) -> "subprocess.Popen[str]":
        """Start a process here."""
        return subprocess.Popen(self.command(arguments), text=True, **options)

    def run(self, arguments: Sequence[str], **options: Any) -> "subprocess.CompletedProcess[str]":
        """Run a process here to its end."""
        return subprocess.run(self.command(arguments), text=True, check=False, **options)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Let the calling thread be in this namespace: a socket that it opens stays there."""
        with enter_namespace(Path("/run/netns") / self.namespace):
            yield

    def close(self) -> None:
        """Delete the namespace with all that is in it."""
        ip("netns", "del", self.namespace)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def connect(
    left: Host,
    left_name: str,
    left_address: str,
    right: Host,
    right_name: str,
    right_address: str,
    mtu: int = 1500,
    ipv6: tuple[str, str] | None = None,
) -> None:
    """Join two hosts by a cable (veth); addresses with their prefix, such as 10.1.0.1/24; `ipv6` the left's first."""
    left.ip(
        *("link", "add", left_name, "mtu", str(mtu), "type", "veth"),
        *("peer", "name", right_name, "mtu", str(mtu), "netns", right.namespace),
    )
    for host, name, address in ((left, left_name, left_address), (right, right_name, right_address)):
        host.ip("addr", "add", address, "dev", name)
        host.ip("link", "set", name, "up")
    if ipv6 is not None:
        left.ip("addr", "add", ipv6[0], "dev", left_name, "nodad")
        right.ip("addr", "add", ipv6[1], "dev", right_name, "nodad")


class Line:
    """gen ─ relay ─ … ─ sink: hosts in a row, each cable a network of its own. A context manager.

    Cable k joins interface `right` of host k, 10.k.0.1 and fd00:k::1, with interface `left` of host k+1, 10.k.0.2 and
    fd00:k::2.
    """

    def __init__(self, *names: str, mtu: int = 1500) -> None:
        self.hosts: list[Host] = []
        try:
            for name in names:
                self.hosts.append(Host(name))
            for k, (left, right) in enumerate(itertools.pairwise(self.hosts), 1):
                ipv6 = f"fd00:{k}::1/64", f"fd00:{k}::2/64"
                connect(left, "right", f"10.{k}.0.1/24", right, "left", f"10.{k}.0.2/24", mtu, ipv6)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Delete every host."""
        for host in self.hosts:
            host.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
