"""What a killed or restarting supervisor leaves running: its workers, and at their template the sockets they need.

The former supervisor wrote the inventory (keeper.py), which only its user can write: pids, rings, memberships. The
template, which is less privileged, holds the descriptors and hands them to whoever connects to its hand-over socket
as root or as the supervisor's user. Each is checked to be what the inventory says before it is used.
"""

import contextlib
import os
import selectors
import signal
import socket
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import posix_ipc

from logging_shm.segment import process_start_ticks
from relay.dataplane import layout
from relay.dataplane.counters import StatsSegment
from relay.descriptors import Channel, ChannelClosedError
from relay.errors import PreflightError, RelayError
from relay.messages import Exited, FromOrphans, KeptAll, Leave
from relay.supervisor.membership import Listen
from relay.supervisor.state import StateFile

VERSION = 1
HANDOVER_S_MAX = 5.0  # a template answers in milliseconds
LISTENER = "listener"
SO_ACCEPTCONN = 30
EXITS_MAX = 1000  # told before the end of the channel: a relay has 64 workers
END_S_MAX = 1.5  # for rings to be emptied


class KeptWorker(msgspec.Struct, frozen=True):
    """A worker's process; the start time (clock ticks since boot) tells it from one with the same pid."""

    core: int
    pid: int
    start_ticks: int


class KeptRing(msgspec.Struct, frozen=True):
    """An interface's rings: their number, and the fanout group that they form, a socket for each core."""

    number: int
    interface: str
    ifindex: int
    fanout_id: int


class KeptMembership(msgspec.Struct, frozen=True):
    """An input that a socket has joined or holds."""

    listen: Listen
    socket: str


class Inventory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is kept beside the descriptors."""

    version: int
    supervisor: int  # pid
    template: int  # pid
    ring_bytes: int
    fanout: int
    cores: tuple[int, ...]
    workers: tuple[KeptWorker, ...] = ()
    rings: tuple[KeptRing, ...] = ()
    joined: tuple[KeptMembership, ...] = ()
    held: tuple[KeptMembership, ...] = ()


def handover_path(control_socket: Path) -> Path:
    """Where the next supervisor finds the template of this one."""
    return control_socket.with_suffix(".handover")


def inventory_file(control_socket: Path) -> StateFile[Inventory]:
    """The file of the inventory."""
    return StateFile(control_socket.with_suffix(".inventory"), Inventory, check, "give --socket another place")


def check(inventory: Inventory) -> None:
    """Raises RelayError for one that this version can't have written."""
    if inventory.version != VERSION:
        raise RelayError(f"version {inventory.version}, expected {VERSION}")


def ring_name(number: int, core: int) -> str:
    """What the socket of a ring is kept as."""
    return f"ring-{number}-core-{core}"


def membership_name(sock: socket.socket) -> str:
    """What a socket that joins or holds inputs is kept as."""
    return f"membership-{sock.fileno()}"


def kept_memberships(sockets: Mapping[Listen, socket.socket]) -> tuple[KeptMembership, ...]:
    """Inputs with the names of their sockets."""
    return tuple(KeptMembership(listen, membership_name(sock)) for listen, sock in sockets.items())


def kept_worker(core: int, pid: int) -> KeptWorker:
    """A running worker."""
    return KeptWorker(core, pid, process_start_ticks(pid) or 0)


@dataclass
class Predecessor:
    """A worker of the former supervisor, which relays until its successor is ready."""

    core: int
    pid: int
    pidfd: int
    stats: StatsSegment
    ring_numbers: dict[str, int]  # by interface

    def fileno(self) -> int:
        """The descriptor to poll: readable when the process has ended. man 2 pidfd_open."""
        return self.pidfd

    def release(self, how: int = layout.RELEASE_NOW) -> None:
        """Tell it to end: after this pass, or with RELEASE_DRAINED after what its rings hold."""
        self.stats.header["release"] = how
        self.stats.ring_doorbell()

    def kill(self) -> None:
        """End one that does not obey."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Let go of it."""
        os.close(self.pidfd)


@dataclass
class Orphans:
    """Everything that is taken over."""

    inventory: Inventory
    channel: Channel[FromOrphans]
    descriptors: dict[str, socket.socket]
    predecessors: dict[int, Predecessor] = field(default_factory=dict)  # by core

    def fits(self, cores: Sequence[int], ring_bytes: int, fanout: int) -> bool:
        """Whether rings can go on with these options."""
        kept = self.inventory
        return (kept.cores, kept.ring_bytes, kept.fanout) == (tuple(cores), ring_bytes, fanout)

    def pids(self) -> set[int]:
        """The workers that run."""
        return {predecessor.pid for predecessor in self.predecessors.values()}

    def take_ring(self, ring: KeptRing) -> list[socket.socket] | None:
        """The sockets of an interface's ring in the order of cores, None unless each is what it should be."""
        names = [ring_name(ring.number, core) for core in self.inventory.cores]
        sockets = [self.descriptors.get(name) for name in names]
        if not all(sock is not None and _is_ring_on(sock, ring) for sock in sockets):
            return None
        return [self.descriptors.pop(name) for name in names]

    def take_memberships(self, kept: Sequence[KeptMembership]) -> dict[Listen, socket.socket]:
        """The sockets that have joined or hold inputs."""
        found = {}
        for membership in kept:
            sock = self.descriptors.get(membership.socket)
            if sock is not None and (sock.family, sock.type) == (socket.AF_INET, socket.SOCK_DGRAM):
                found[membership.listen] = sock
        for membership in kept:
            self.descriptors.pop(membership.socket, None)
        return found

    def take_listener(self, path: Path) -> socket.socket | None:
        """The listening control socket, if it is the one at `path`."""
        sock = self.descriptors.get(LISTENER)
        if sock is None or sock.family != socket.AF_UNIX or sock.getsockname() != str(path) or not path.is_socket():
            return None
        return self.descriptors.pop(LISTENER) if sock.getsockopt(socket.SOL_SOCKET, SO_ACCEPTCONN) else None

    def abandon(self) -> None:
        """Leave everything to the next one: this start has failed."""
        self.channel.close()

    def close(self) -> None:
        """Let go of what was not taken, and of the template, whose workers have ended."""
        with contextlib.suppress(ChannelClosedError, OSError, msgspec.ValidationError):
            self.channel.send(Leave())
            for _ in range(EXITS_MAX):  # of workers, then the end
                self.channel.receive()
        self.channel.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.inventory.template, 0)  # a child of this process, if that became another program
        for sock in self.descriptors.values():
            sock.close()
        for predecessor in self.predecessors.values():
            predecessor.close()
        self.descriptors.clear()
        self.predecessors.clear()


def _is_ring_on(sock: socket.socket, ring: KeptRing) -> bool:
    """Whether a descriptor is a packet socket bound to the ring's interface."""
    if sock.family != socket.AF_PACKET or sock.type != socket.SOCK_RAW:
        return False
    try:
        return bool(socket.if_nametoindex(ring.interface) == ring.ifindex and sock.getsockname()[0] == ring.interface)
    except OSError:
        return False


def take_over(
    control_socket: Path, instance: str | None, cores: Sequence[int], ring_bytes: int, fanout: int
) -> tuple["Orphans | None", list[str]]:
    """What a dead supervisor of this instance left running, and lines for the log. Only when it is known to be dead.

    Workers that can't be taken over end before this returns. Raises PreflightError.
    """
    inventory, lines = inventory_file(control_socket).load()
    if inventory is None:
        return None, lines
    path = handover_path(control_socket)
    running = predecessors(inventory, instance)
    channel = connect(path)
    if channel is None:
        if running:
            lines.append(f"Workers of supervisor {inventory.supervisor} had no template left and were ended")
        end(running.values())
        return None, lines
    orphans = Orphans(inventory, channel, receive(channel, path), running)
    if running and orphans.fits(cores, ring_bytes, fanout):
        return orphans, lines
    if running:
        lines.append(f"Workers of supervisor {inventory.supervisor} have other cores or rings and were ended")
    end(running.values())
    orphans.close()
    return None, lines


def end(running: Collection[Predecessor]) -> None:
    """End workers when their rings are empty, at the deadline in any case."""
    for predecessor in running:
        predecessor.release(layout.RELEASE_DRAINED)
    deadline_s = time.monotonic() + END_S_MAX
    with selectors.DefaultSelector() as selector:
        for predecessor in running:
            selector.register(predecessor, selectors.EVENT_READ)
        while selector.get_map() and time.monotonic() < deadline_s:
            for key, _ in selector.select(deadline_s - time.monotonic()):
                selector.unregister(key.fileobj)
        for key in list(selector.get_map().values()):
            assert isinstance(key.fileobj, Predecessor)
            key.fileobj.kill()


def open_process(worker: KeptWorker) -> int | None:
    """A pidfd of a worker that still runs."""
    try:
        pidfd = os.pidfd_open(worker.pid)
    except ProcessLookupError:
        return None
    # The pidfd is open, so the pid can't go to another process between this look and its use.
    if process_start_ticks(worker.pid) == worker.start_ticks:
        return pidfd
    os.close(pidfd)
    return None


def connect(path: Path) -> Channel[FromOrphans] | None:
    """The channel to an orphaned template, None when nobody is there."""
    end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    end.settimeout(HANDOVER_S_MAX)
    try:
        end.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        end.close()
        return None
    except OSError as error:
        end.close()
        raise PreflightError(f"hand-over socket {path}: {error.strerror}: another mcrd may be starting") from error
    return Channel(end, FromOrphans)


def receive(channel: Channel[FromOrphans], path: Path) -> dict[str, socket.socket]:
    """Every descriptor that is kept, by name. Raises PreflightError."""
    found: dict[str, socket.socket] = {}
    try:
        while True:
            message, descriptors = channel.receive()
            if isinstance(message, KeptAll):
                return found
            if isinstance(message, Exited):
                continue
            for name, descriptor in zip(message.names, descriptors, strict=True):
                found[name] = socket.socket(fileno=descriptor)
    except (OSError, ValueError, ChannelClosedError, msgspec.ValidationError) as error:
        for sock in found.values():
            sock.close()
        raise PreflightError(f"hand-over socket {path}: {error or 'closed'}: another mcrd may be starting") from error


def predecessors(inventory: Inventory, instance: str | None) -> dict[int, Predecessor]:
    """The workers of the inventory that run."""
    numbers = {ring.interface: ring.number for ring in inventory.rings}
    found = {}
    for worker in inventory.workers:
        pidfd = open_process(worker)
        if pidfd is None:
            continue
        try:
            stats = StatsSegment.attach(worker.core, instance)
        except (posix_ipc.Error, OSError, ValueError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)  # nobody can talk to it
            os.close(pidfd)
            continue
        found[worker.core] = Predecessor(worker.core, worker.pid, pidfd, stats, numbers)
    return found
