"""The packet rings of all interfaces: which there are, who reads them, what they admit.

The supervisor's, part of the fleet (fleet.py). Each interface with inputs has a ring number and a socket of each
worker, which share its traffic as a fanout group; where it has protected inputs it has one more, which a single worker
reads, as both legs of a rule must be merged in one place. A ring that no worker reads goes on filling.
"""

import contextlib
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from relay import bpf
from relay.dataplane import layout
from relay.errors import RelayError
from relay.messages import RemoveRing
from relay.rules import Leg
from relay.supervisor.exclusive import Exclusive
from relay.supervisor.ingress import Fanout, attach_filter, count_filled, is_bound, open_ring, take_ring_drops
from relay.supervisor.membership import Memberships
from relay.supervisor.numbers import Numbers
from relay.supervisor.orphans import KeptRing, Orphans
from relay.supervisor.plan import Plan, PlannedRule
from relay.supervisor.protections import Protections
from relay.supervisor.worker import Worker

Place = tuple[str, int]  # group, port
RingKey = tuple[str, bool]  # interface, and whether it is the ring of its protected inputs


@dataclass
class Ring:
    """A ring number: the interface it reads, and that interface's fanout group.

    Or the ring of the interface's protected inputs: both legs of a rule must be merged by one worker, so one reads it.
    """

    number: int
    interface: str
    ifindex: int
    fanout_id: int | None = None
    reader: int | None = None  # the core whose worker alone reads it; None: every worker, each a share
    is_adopted: bool = False  # from a former supervisor: a predecessor may have read some of it


class Rings:
    """Every ring, by its interface and whether it has that one's protected inputs."""

    def __init__(
        self,
        workers: Sequence[Worker],
        ring_bytes: int,
        fanout: Fanout,
        memberships: Memberships,
        protections: Protections,
        exclusive: Exclusive | None,
        orphans: Orphans | None,
    ) -> None:
        """`workers` is the fleet's own list. Rings of `orphans` are adopted as rules want them."""
        self.revision = 0  # of what the inventory tells
        self.lacks_ring = False  # a ring was lost that `follow` opens anew
        self._workers = workers
        self._ring_bytes = ring_bytes
        self._fanout = fanout
        self._memberships = memberships
        self._protections = protections
        self._exclusive = exclusive
        self._orphans = orphans
        self._plan = Plan()
        self._rings: dict[RingKey, Ring] = {}
        self._admitted: dict[RingKey, set[Place]] = {}  # by the filters that rings have now
        self._reader: int | None = None  # the core of the worker that reads protected inputs, of all interfaces
        self._numbers = Numbers(layout.RINGS_MAX)
        self._retired: list[int] = []  # numbers that the former table may use
        self._orphaned: dict[tuple[str, bool, int], KeptRing] = {}  # not adopted yet
        if orphans is not None:
            kept = orphans.inventory.rings
            self._orphaned = {(ring.interface, ring.reader is not None, ring.ifindex): ring for ring in kept}
            self._numbers.reserve({ring.number for ring in kept})
            self._reader = next((ring.reader for ring in kept if ring.reader is not None), None)

    def __iter__(self) -> Iterator[Ring]:
        return iter(self._rings.values())

    def __contains__(self, key: RingKey) -> bool:
        return key in self._rings

    def number(self, key: RingKey) -> int:
        """A ring's number."""
        return self._rings[key].number

    def _readers(self, ring: Ring) -> list[Worker]:
        return [worker for worker in self._workers if not worker.is_excluded and ring.reader in (None, worker.core)]

    def created_anew(self) -> set[str]:
        """Interfaces that are not those that their rings were opened on, though name and index may be the same.

        So it is after a visit to another network namespace, or when a tool asks for the index.
        """
        return {
            ring.interface
            for ring in self._rings.values()
            if not all(is_bound(worker.rings[ring.number]) for worker in self._readers(ring))
        }

    def follow(self, plan: Plan, warnings: list[str]) -> None:
        """Open rings on interfaces that came, close those of interfaces that went.

        The ring of protected inputs that are none any more goes later (`finish`): others may still want them.
        """
        self._plan, self.lacks_ring = plan, False
        created_anew = self.created_anew()
        for key, ring in list(self._rings.items()):
            name = ring.interface
            if plan.rings.get(name) == ring.ifindex and name not in created_anew:
                continue
            del self._rings[key]
            if name in created_anew:
                self._memberships.forget(ring.ifindex)
                if self._exclusive is not None:
                    self._exclusive.forget()
            self._close(key, ring)
            for worker in self._workers:
                worker.forget_place(ring.number)
        wanted: list[RingKey] = [(name, False) for name in plan.rings]
        wanted += [(name, True) for name in plan.rings if name in plan.protected]
        for key in wanted:
            if key not in self._rings:
                try:
                    self._open(key, plan.rings[key[0]])
                except RelayError as error:
                    warnings.append(str(error))
        for kept in self._orphaned.values():
            self._disown(kept)
            self._numbers.give_back([kept.number])
        self._orphaned.clear()

    def finish(self) -> bool:
        """Admit what the plan has, end what it has no use for; every worker uses its table.

        True when an input has gone from one ring to another, of which the next table need not know any more.
        """
        retired, self._retired = self._retired, []
        has_moved = any(self.moved().values())
        self._set_filters()
        self._end()
        self._numbers.give_back(retired)
        return has_moved

    def _close(self, key: RingKey, ring: Ring) -> None:
        for worker in self._readers(ring):
            if worker.running:
                worker.send(RemoveRing(ring.number))
            worker.rings.pop(ring.number).close()
        self._admitted.pop(key, None)
        self._retired.append(ring.number)

    def _end(self) -> None:
        """Close rings of protected inputs that are none any more. Workers relay what is in them first."""
        for key, ring in list(self._rings.items()):
            if ring.reader is not None and ring.interface not in self._plan.protected:
                del self._rings[key]
                self._close(key, ring)
                self.revision += 1

    def _open(self, key: RingKey, ifindex: int) -> None:
        name, is_protected = key
        kept = self._orphaned.pop((name, is_protected, ifindex), None)
        ring = Ring(self._numbers.take() if kept is None else kept.number, name, ifindex)
        if is_protected:
            ring.reader = self._reader_of_protected().core
        if kept is None:
            for worker in self._workers:
                worker.forget_place(ring.number)
        sockets = [] if kept is None else self._take_over(ring, kept)
        readers = self._readers(ring)
        mode = None if is_protected else self._fanout
        try:
            while len(sockets) < len(readers):
                sock, ring.fanout_id = open_ring(name, self._ring_bytes, mode, ring.fanout_id)
                sockets.append(sock)
        except RelayError:
            self._numbers.give_back([ring.number])
            for sock in sockets:
                sock.close()
            raise
        self._rings[key] = ring
        for worker, sock in zip(readers, sockets, strict=True):
            worker.rings[ring.number] = sock
            if worker.running and worker.predecessor is None:
                worker.hand_ring(ring.number, self._ring_bytes)

    def _reader_of_protected(self) -> Worker:
        """Who reads protected inputs: the worker of the lowest core that gets traffic, until it gets none."""
        able = {worker.core: worker for worker in self._workers if not worker.is_excluded}
        if self._reader not in able:
            self._reader = min(able)
        return able[self._reader]

    def _take_over(self, ring: Ring, kept: KeptRing) -> list[socket.socket]:
        """The sockets of a former supervisor's ring on this interface, which go on filling meanwhile; [] without."""
        assert self._orphans is not None
        sockets = self._orphans.take_ring(kept)
        if sockets is None:
            self._disown(kept)  # created anew while nobody looked, under its old index
            return []
        ring.fanout_id, ring.is_adopted = kept.fanout_id, True
        for worker in self._readers(ring):
            if worker.predecessor is None:  # it has died, and its rings went on filling
                self._go_on_in(worker, ring)
        return sockets

    def _disown(self, kept: KeptRing) -> None:
        """An interface is gone: what was read and joined there is nothing to one that has its number or its index."""
        self._memberships.forget(kept.ifindex)
        for worker in self._workers:
            worker.forget_place(kept.number)

    def _go_on_in(self, worker: Worker, ring: Ring) -> None:
        """Let a worker begin where its predecessor left off."""
        assert self._orphans is not None
        worker.stats.header["ring_sent"][ring.number] = self._orphans.place(worker.core, ring.number)
        if ring.reader is not None:
            former = self._orphans.kept.stats[worker.core]
            self._protections.inherit(worker.stats, former, with_counts=False)

    def _wanted_by(self, key: RingKey) -> set[Place]:
        """What a ring is to admit."""
        name, is_protected = key
        protected = self._plan.protected.get(name, set()) if (name, True) in self._rings else set()
        return protected if is_protected else self._plan.admitted[name] - protected

    def moved(self) -> dict[RingKey, set[Place]]:
        """What each ring admits still, and its interface's other ring is to admit."""
        moved = {}
        for name, is_protected in self._rings:
            other = (name, not is_protected)
            if other in self._rings:
                moved[name, is_protected] = self._admitted.get((name, is_protected), set()) & self._wanted_by(other)
        return moved

    def _set_filters(self) -> None:
        """Let in what the plan has. What goes from one ring to another is in both for a moment, rather than in none."""
        wanted = {key: self._wanted_by(key) for key in self._rings}
        for (name, is_protected), moved in self.moved().items():
            key = (name, not is_protected)
            if moved:
                self._attach(key, moved | wanted[key] | self._admitted.get(key, set()))
        for key, inputs in wanted.items():
            self._attach(key, inputs)

    def _attach(self, key: RingKey, inputs: set[Place]) -> None:
        program = bpf.assemble(inputs)
        for worker in self._readers(self._rings[key]):
            attach_filter(worker.rings[self._rings[key].number], program)
        self._admitted[key] = inputs

    def keep_from_host(self) -> list[str]:
        """Let the host's own stack have what is not relayed, and only that, if the relay is exclusive."""
        if self._exclusive is None:
            return []
        try:
            self._exclusive.apply(
                {(ring.interface, ring.ifindex): self._plan.admitted[ring.interface] for ring in self._rings.values()}
            )
        except RelayError as error:
            return [str(error)]
        return []

    def key_of(self, interface: str, place: Place) -> RingKey:
        """The ring of an interface that has an input."""
        is_protected = place in self._plan.protected.get(interface, ()) and (interface, True) in self._rings
        return interface, is_protected

    def interface_names(self) -> dict[int, str]:
        """The interfaces of the rings, by ring number."""
        return {ring.number: ring.interface for ring in self._rings.values()}

    def inputs_of(self, planned: PlannedRule) -> Iterator[tuple[Leg, int]]:
        """Where a rule takes in: each leg with the number of each ring that it comes by."""
        for leg, interfaces in planned.inputs:
            place = leg.group, leg.port
            for name in interfaces:
                ring = self._rings.get(self.key_of(name, place))
                if ring is not None:
                    yield leg, ring.number

    def reader(self) -> Worker | None:
        """The worker that merges the legs of protected rules; None as long as there are none."""
        return next((worker for worker in self._workers if worker.core == self._reader), None)

    def hand(self, worker: Worker) -> None:
        """Have a worker read all that are its."""
        if self._orphans is not None:
            self._orphans.follow(worker.core, worker.stats)
        for number in worker.rings:
            worker.hand_ring(number, self._ring_bytes)

    def inherit(self, worker: Worker) -> None:
        """A predecessor has ended: have the worker go on where that one left off."""
        for ring in self._rings.values():
            if ring.is_adopted and worker in self._readers(ring):
                self._go_on_in(worker, ring)
        if worker.running:
            self.hand(worker)

    def kept(self) -> tuple[KeptRing, ...]:
        """What the next supervisor must know of them."""
        return tuple(
            KeptRing(ring.number, ring.interface, ring.ifindex, ring.fanout_id or 0, ring.reader)
            for ring in self._rings.values()
            if ring.fanout_id is not None or ring.reader is not None
        )

    def exclude(self, worker: Worker) -> int | None:
        """Give a worker's share of the traffic to the others; return the frames lost by it, None without others."""
        if all(other.is_excluded for other in self._workers if other is not worker):
            return None
        moving = {key: ring for key, ring in self._rings.items() if ring.reader == worker.core}
        worker.is_excluded = True
        opened = {key: self._open_beside(ring) for key, ring in moving.items()}
        lost = 0
        for number, sock in worker.rings.items():
            with contextlib.suppress(OSError):  # no memory for looking into it
                lost += count_filled(sock, self._ring_bytes)
            lost += take_ring_drops(sock)  # since the last count; the kernel's number goes with the socket
            sock.close()  # which takes it out of the fanout group
            worker.forget_place(number)
        worker.rings.clear()
        for key, ring in moving.items():
            self._give_to_another(worker, key, ring, opened[key])
        worker.stats.add_ring_full(lost)
        self.revision += 1
        return lost

    def _open_beside(self, ring: Ring) -> socket.socket | None:
        """Another ring for the same protected inputs; None when the kernel refuses."""
        try:
            sock, _ = open_ring(ring.interface, self._ring_bytes, None, None)
        except RelayError:
            return None
        try:
            attach_filter(sock, bpf.assemble(self._admitted.get((ring.interface, True), set())))
        except OSError:
            sock.close()
            return None
        return sock

    def _give_to_another(self, former: Worker, key: RingKey, ring: Ring, sock: socket.socket | None) -> None:
        """Another worker reads protected inputs from now on, and knows what was let through.

        Not what the former's ring holds: one of these frames may be what it dies of.
        """
        if sock is None:
            del self._rings[key]
            self._admitted.pop(key, None)
            self._retired.append(ring.number)
            self.lacks_ring = True
            return
        heir = self._reader_of_protected()
        self._protections.inherit(heir.stats, former.stats, with_counts=True)
        heir.forget_place(ring.number)
        ring.reader, heir.rings[ring.number] = heir.core, sock
        if heir.running and heir.predecessor is None:
            heir.hand_ring(ring.number, self._ring_bytes)

    def readmit(self, worker: Worker) -> None:
        """Give a worker its share again. Raises RelayError when a ring can't be opened; it stays excluded then."""
        opened: dict[int, socket.socket] = {}
        try:
            for key, ring in self._rings.items():
                if ring.reader is None:
                    opened[ring.number], _ = open_ring(ring.interface, self._ring_bytes, self._fanout, ring.fanout_id)
                    attach_filter(opened[ring.number], bpf.assemble(self._admitted.get(key, set())))
        except (RelayError, OSError) as error:
            for sock in opened.values():
                sock.close()
            raise RelayError(f"worker of core {worker.core} gets no traffic: {error}") from error
        worker.is_excluded = False
        worker.rings = opened
        if worker.running:
            self.hand(worker)
        self.revision += 1

    def count_drops(self) -> dict[tuple[int, str], int]:
        """Count the frames that the kernel dropped since the last call; return them by core and interface."""
        lost: dict[tuple[int, str], int] = {}
        for ring in self._rings.values():
            for worker in self._readers(ring):
                frames = take_ring_drops(worker.rings[ring.number])
                if frames:
                    worker.stats.add_ring_full(frames)
                    lost[worker.core, ring.interface] = lost.get((worker.core, ring.interface), 0) + frames
        return lost
