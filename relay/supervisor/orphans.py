"""What a killed or restarting supervisor leaves running: its workers, and at their template the sockets they need.

The former supervisor wrote the inventory (keeper.py), which only its user can write: pids, rings, memberships. Who
takes over holds a lock on it, so that it is one. The template, which is less privileged, holds the descriptors and
hands them to whoever connects to its hand-over socket as root or as the supervisor's user. Each is checked to be what
the inventory says before it is used. What the template has not, as it died, is taken from the workers (salvage.py).
"""

import contextlib
import fcntl
import os
import selectors
import socket
import stat
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec
import posix_ipc

from logging_shm.segment import process_start_ticks
from relay.addresses import family
from relay.dataplane import layout
from relay.dataplane.copies import Copies
from relay.dataplane.counters import StatsHeader, StatsSegment
from relay.descriptors import Channel, ChannelClosedError
from relay.errors import PreflightError, RelayError
from relay.messages import Exited, FromOrphans, Keep, KeptAll, Leave
from relay.supervisor import kin
from relay.supervisor.health import PULSE_INTERVAL_S, Pulse
from relay.supervisor.membership import Listen
from relay.supervisor.salvage import Bound, salvage
from relay.supervisor.state import StateFile
from relay.supervisor.vitals import read_vitals

VERSION = 1
HANDOVER_S_MAX = 5.0  # of time that a template could use: it answers in milliseconds, or loads compiled code first
LISTENER = "listener"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
SO_ACCEPTCONN = 30
END_S_MAX = 1.5  # for rings to be emptied
TEMPLATE_END_S_MAX = 1.0


class KeptProcess(msgspec.Struct, frozen=True):
    """A process; the start time (clock ticks since boot) tells it from one with the same pid."""

    pid: int
    start_ticks: int


class KeptWorker(KeptProcess, frozen=True):
    """A worker's process."""

    core: int


class KeptRing(msgspec.Struct, frozen=True):
    """An interface's rings: their number, and the fanout group that they form, a socket for each core.

    Or a ring of protected inputs, which the worker of core `reader` alone has, in no group.
    """

    number: int
    interface: str
    ifindex: int
    fanout_id: int
    reader: int | None = None

    def cores(self, every: Sequence[int]) -> Sequence[int]:
        """The cores whose workers read it."""
        return every if self.reader is None else (self.reader,)


class KeptMembership(msgspec.Struct, frozen=True):
    """An input that a socket has joined or holds."""

    listen: Listen
    socket: str


class Inventory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is kept beside the descriptors."""

    version: int
    boot_id: str
    supervisor: int  # pid
    template: KeptProcess
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


def inventory_path(control_socket: Path) -> Path:
    """Where the inventory is."""
    return control_socket.with_suffix(".inventory")


def inventory_file(control_socket: Path) -> StateFile[Inventory]:
    """The file of the inventory."""
    return StateFile(inventory_path(control_socket), Inventory, check, "give --socket another place")


def check(inventory: Inventory) -> None:
    """Raises RelayError for one that this version can't have written."""
    if inventory.version != VERSION:
        raise RelayError(f"version {inventory.version}, expected {VERSION}")


def ring_name(number: int, core: int) -> str:
    """What the socket of a ring is kept as."""
    return f"ring-{number}-core-{core}"


def stats_name(core: int) -> str:
    """What the counters of the worker that reads a core's rings are kept as: they tell where to go on."""
    return f"stats-core-{core}"


def copies_name(core: int) -> str:
    """What a worker's copy arena is kept as."""
    return f"copies-core-{core}"


def membership_name(sock: socket.socket) -> str:
    """What a socket that joins or holds inputs is kept as."""
    return f"membership-{sock.fileno()}"


def kept_memberships(sockets: Mapping[Listen, socket.socket]) -> tuple[KeptMembership, ...]:
    """Inputs with the names of their sockets."""
    return tuple(KeptMembership(listen, membership_name(sock)) for listen, sock in sockets.items())


def kept_worker(core: int, pid: int) -> KeptWorker:
    """A running worker."""
    return KeptWorker(pid, process_start_ticks(pid) or 0, core)


def kept_template(pid: int) -> KeptProcess:
    """The template that runs."""
    return KeptProcess(pid, process_start_ticks(pid) or 0)


def boot_id() -> str:
    """What tells this boot from others, in which pids and start times come again. man 4 random."""
    return BOOT_ID.read_text().strip()


@dataclass
class Predecessor:
    """A worker of the former supervisor, which relays until its successor is ready."""

    core: int
    pid: int
    pidfd: int
    stats: StatsHeader

    def fileno(self) -> int:
        """The descriptor to poll: readable when the process has ended. man 2 pidfd_open."""
        return self.pidfd

    def release(self, how: int = layout.RELEASE_NOW) -> None:
        """Tell it to end: after this pass, or with RELEASE_DRAINED after what its rings hold."""
        self.stats.header["release"] = how
        self.stats.ring_doorbell()

    def kill(self) -> None:
        """End one that does not obey."""
        kin.kill(self.pidfd)

    def close(self) -> None:
        """Let go of it."""
        os.close(self.pidfd)
        self.stats.close()


@dataclass
class Kept:
    """What the template held: sockets by name, counters and copy arenas by core."""

    cores: Collection[int] = ()
    sockets: dict[str, socket.socket] = field(default_factory=dict)
    stats: dict[int, StatsHeader] = field(default_factory=dict)
    copies: dict[int, Copies] = field(default_factory=dict)

    def add(self, name: str, descriptor: int) -> None:
        """Take a descriptor in, or close it when it is none of them. Raises OSError."""
        status = os.fstat(descriptor)
        of_stats = {stats_name(core): core for core in self.cores}.get(name)
        of_copies = {copies_name(core): core for core in self.cores}.get(name)
        if of_stats is not None and stat.S_ISREG(status.st_mode) and status.st_size >= StatsHeader.mapped_bytes:
            self.stats[of_stats] = StatsHeader(name, descriptor, owner=False)
        elif of_copies is not None and Copies.is_one(descriptor):
            self.copies[of_copies] = Copies(descriptor)
        elif of_stats is of_copies is None and stat.S_ISSOCK(status.st_mode):
            self.sockets[name] = socket.socket(fileno=descriptor)
        else:
            os.close(descriptor)

    def close(self) -> None:
        """Close what was not taken."""
        for sock in self.sockets.values():
            sock.close()
        for stats in self.stats.values():
            stats.close()
        for copies in self.copies.values():
            copies.close()
        self.sockets.clear()
        self.stats.clear()
        self.copies.clear()


@dataclass
class Orphans:
    """Everything that is taken over."""

    inventory: Inventory
    channel: Channel[FromOrphans] | None  # None: the template is dead
    template: int | None  # pidfd; None: as above
    kept: Kept
    predecessors: dict[int, Predecessor] = field(default_factory=dict)  # by core
    is_over: bool = False

    def fits(self, cores: Sequence[int], ring_bytes: int, fanout: int) -> bool:
        """Whether rings can go on with these options.

        An interface's ring can only with the share of every worker: some may have been excluded, and have none.
        """
        kept = self.inventory
        if (kept.cores, kept.ring_bytes, kept.fanout) != (tuple(cores), ring_bytes, fanout):
            return False
        names = {ring_name(ring.number, core) for ring in kept.rings for core in ring.cores(kept.cores)}
        return names <= self.kept.sockets.keys() and set(kept.cores) <= self.kept.stats.keys()

    def pids(self) -> set[int]:
        """The processes that run and use segments."""
        template = () if self.template is None else (self.inventory.template.pid,)
        return {*template, *(predecessor.pid for predecessor in self.predecessors.values())}

    def stats_identities(self) -> set[int]:
        """The files of the counters, as logging_shm.segment.identity_of tells them."""
        return {os.fstat(stats.fileno()).st_ino for stats in self.kept.stats.values()}

    def place(self, core: int, ring_number: int) -> int:
        """How far a core's ring was read, as `ring_sent` of the stats header counts it."""
        return int(self.kept.stats[core].header["ring_sent"][ring_number])

    def follow(self, core: int, stats: StatsSegment) -> None:
        """Another worker reads the core's rings from now on: if this take-over fails, it tells the next where."""
        if self.is_over or self.channel is None:
            return
        with contextlib.suppress(ChannelClosedError, OSError):
            self.channel.send(Keep((stats_name(core),)), [stats.fileno()])

    def take_ring(self, ring: KeptRing) -> list[socket.socket] | None:
        """The sockets of an interface's ring in the order of its cores, None unless each is what it should be."""
        names = [ring_name(ring.number, core) for core in ring.cores(self.inventory.cores)]
        sockets = [self.kept.sockets.get(name) for name in names]
        if not all(sock is not None and _is_ring_on(sock, ring) for sock in sockets):
            return None
        return [self.kept.sockets.pop(name) for name in names]

    def take_copies(self, core: int) -> Copies | None:
        """What the core's worker fetched and may not have sent; None of a version that kept it in the worker."""
        return self.kept.copies.pop(core, None)

    def take_memberships(self, kept: Sequence[KeptMembership]) -> dict[Listen, socket.socket]:
        """The sockets that have joined or hold inputs."""
        found = {}
        for membership in kept:
            sock = self.kept.sockets.get(membership.socket)
            expected = family(membership.listen.address), socket.SOCK_DGRAM
            if sock is not None and (sock.family, sock.type) == expected:
                found[membership.listen] = sock
        for membership in kept:
            self.kept.sockets.pop(membership.socket, None)
        return found

    def take_listener(self, path: Path) -> socket.socket | None:
        """The listening control socket, if it is the one at `path`."""
        sock = self.kept.sockets.get(LISTENER)
        if sock is None or sock.family != socket.AF_UNIX or sock.getsockname() != str(path) or not path.is_socket():
            return None
        return self.kept.sockets.pop(LISTENER) if sock.getsockopt(socket.SOL_SOCKET, SO_ACCEPTCONN) else None

    def abandon(self) -> None:
        """Leave everything to the next one: this start has failed."""
        self.is_over = True
        if self.channel is not None:
            self.channel.close()

    def close(self) -> None:
        """Let go of what was not taken, and of the template, whose workers have ended."""
        if self.is_over:
            return
        self.is_over = True
        if self.channel is not None:
            with contextlib.suppress(ChannelClosedError, OSError):
                self.channel.send(Leave())
            self.channel.close()
        if self.template is not None:
            end_template(self.template)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(
                self.inventory.template.pid, os.WNOHANG
            )  # a child of this process, if that became another program
        for predecessor in self.predecessors.values():
            predecessor.close()
        self.kept.close()
        self.predecessors.clear()


def end_template(pidfd: int) -> None:
    """Wait until a template has ended that has no reason to stay, and end it if it does."""
    with selectors.DefaultSelector() as selector:
        selector.register(pidfd, selectors.EVENT_READ)
        if not selector.select(TEMPLATE_END_S_MAX):
            kin.kill(pidfd)
            selector.select(TEMPLATE_END_S_MAX)
    os.close(pidfd)


def _is_ring_on(sock: socket.socket, ring: KeptRing) -> bool:
    """Whether a descriptor is a packet socket bound to the ring's interface."""
    if sock.family != socket.AF_PACKET or sock.type != socket.SOCK_RAW:
        return False
    try:
        return bool(socket.if_nametoindex(ring.interface) == ring.ifindex and sock.getsockname()[0] == ring.interface)
    except OSError:
        return False


def claim(control_socket: Path) -> int | None:
    """Lock the inventory, so that only this process takes over; None without one. The descriptor holds the lock.

    Raises PreflightError.
    """
    path = inventory_path(control_socket)
    while True:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:  # none, or one that is refused when it is read
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), path.lstat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise PreflightError(f"{path}: another mcrd is starting: stop it, or choose another --instance") from None
        except FileNotFoundError:
            pass
        os.close(descriptor)  # of a file that was replaced meanwhile


def take_over(
    control_socket: Path, instance: str | None, cores: Sequence[int], ring_bytes: int, fanout: int
) -> tuple["Orphans | None", list[str]]:
    """What a dead supervisor of this instance left running, and lines for the log.

    Only with the inventory's lock (`claim`), and when that supervisor is known to be dead. Workers that can't be taken
    over end before this returns. Raises PreflightError.
    """
    inventory, lines = inventory_file(control_socket).load()
    if inventory is None or inventory.boot_id != boot_id():
        return None, lines
    former = f"supervisor {inventory.supervisor}"
    template = open_process(inventory.template)
    channel: Channel[FromOrphans] | None = None
    kept = Kept(inventory.cores)
    if template is not None:
        channel, kept = _fetch(handover_path(control_socket), inventory)
    if template is not None and channel is None:
        lines.append(f"The template of {former} did not answer and was killed")
        kin.kill(template)
        end_template(template)
        template = None
    running = predecessors(inventory, instance, kept, lines)
    orphans = Orphans(inventory, channel, template, kept, running)
    # Without a worker there are rings that fill, if the template has kept them.
    if (running or template is not None) and orphans.fits(cores, ring_bytes, fanout):
        if template is None:
            lines.append(f"Workers of {former} had no template left: their rings were taken from themselves")
        return orphans, lines
    if running:
        why = "have other cores or rings" if template is not None else "had no template left"
        lines.append(f"Workers of {former} {why} and were ended")
    end(running.values())
    orphans.close()
    return None, lines


def _fetch(path: Path, inventory: Inventory) -> tuple[Channel[FromOrphans] | None, Kept]:
    """The channel to an orphaned template and what it kept; None and nothing from one that does not answer."""
    channel = connect(path)
    kept = Kept(inventory.cores)
    if channel is None:
        return None, kept
    try:
        receive(channel, kept, inventory.template.pid)
    except (OSError, ValueError, ChannelClosedError, msgspec.ValidationError):
        channel.close()
        kept.close()
        return None, Kept(inventory.cores)
    return channel, kept


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


def open_process(worker: KeptProcess) -> int | None:
    """A pidfd of a process that still runs."""
    try:
        pidfd = os.pidfd_open(worker.pid)
    except OSError:
        return None
    # The pidfd is open, so the pid can't go to another process between this look and its use.
    if process_start_ticks(worker.pid) == worker.start_ticks and not kin.has_ended(pidfd):
        return pidfd
    os.close(pidfd)
    return None


def _complete(kept: Kept, inventory: Inventory, worker: KeptWorker, pidfd: int) -> None:
    """Take from a worker what should be kept for its core and is not. Raises OSError."""
    core = worker.core
    missing = {
        name: Bound(ring.interface, ring.ifindex, ring.fanout_id)
        for ring in inventory.rings
        if (name := ring_name(ring.number, core)) not in kept.sockets
    }
    if not missing and core in kept.stats and core in kept.copies:
        return
    salvaged = salvage(pidfd, worker.pid, core, set(missing.values()))
    kept.sockets |= {name: salvaged.sockets[bound] for name, bound in missing.items() if bound in salvaged.sockets}
    if salvaged.copies is not None and kept.copies.setdefault(core, salvaged.copies) is not salvaged.copies:
        salvaged.copies.close()
    if salvaged.stats is not None and core not in kept.stats:
        kept.stats[core] = StatsHeader(stats_name(core), salvaged.stats, owner=False)
    elif salvaged.stats is not None:
        os.close(salvaged.stats)


def connect(path: Path) -> Channel[FromOrphans] | None:
    """The channel to an orphaned template, None when it does not take it. Nothing takes longer there than a pulse."""
    end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    end.settimeout(PULSE_INTERVAL_S)
    try:
        end.connect(str(path))
    except OSError:
        end.close()
        return None
    return Channel(end, FromOrphans)


def receive(channel: Channel[FromOrphans], kept: Kept, template_pid: int) -> None:
    """Receive every descriptor that is kept. Raises OSError, ChannelClosedError, ValidationError, ValueError.

    TimeoutError is for a template that says nothing, though it could.
    """
    received, pulse = 0, Pulse()
    pulse.begin(time.monotonic())
    while True:
        try:
            message, descriptors = channel.receive()
        except TimeoutError:
            if pulse.hangs(received, time.monotonic(), partial(read_vitals, template_pid), HANDOVER_S_MAX):
                raise
            continue
        received += 1
        if isinstance(message, KeptAll):
            return
        if isinstance(message, Exited):
            continue
        for name, descriptor in zip(message.names, descriptors, strict=True):
            kept.add(name, descriptor)


def predecessors(inventory: Inventory, instance: str | None, kept: Kept, lines: list[str]) -> dict[int, Predecessor]:
    """The workers of the inventory that run; adds to `kept` what only they have, and to `lines` why that failed."""
    found = {}
    for worker in inventory.workers:
        pidfd = open_process(worker)
        if pidfd is None:
            continue
        try:
            _complete(kept, inventory, worker, pidfd)
        except OSError as error:
            remedy = ": that needs CAP_SYS_PTRACE" if isinstance(error, PermissionError) else ""
            lines.append(f"What worker {worker.pid} has open can't be taken from it: {error.strerror}{remedy}")
        try:
            # The name may be that of a later worker, whose supervisor was killed while it took over.
            stats = kept.stats.get(worker.core) or StatsHeader.attach(worker.core, instance)
        except (posix_ipc.Error, OSError, ValueError):
            kin.kill(pidfd)  # nobody can talk to it
            os.close(pidfd)
            continue
        found[worker.core] = Predecessor(worker.core, worker.pid, pidfd, stats)
    return found
