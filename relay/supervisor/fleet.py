"""The fleet: the workers, and all that is handed to them - rings, egress sockets, rule tables.

Owned by the supervisor's thread. `begin` goes over to a new set of rules without a gap: sockets are opened
and handed out first, then the table that uses them. Once every worker has said that no packet is handled by
the old table any more, `finish` closes what only that one used and lets new traffic in.
"""

import contextlib
import os
import socket
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec

from logging_shm import LevelPolicy, SharedMemoryLogManager
from relay import bpf
from relay.addresses import endpoint
from relay.dataplane import events, layout
from relay.dataplane.copies import Copies
from relay.dataplane.counters import StatsSegment
from relay.dataplane.guard_cells import GuardCells
from relay.dataplane.table import OwnSource, TableOutput, TableRule, compile_table, publish
from relay.descriptors import DESCRIPTORS_MAX, Channel, ChannelClosedError
from relay.errors import RelayError, RuleError
from relay.messages import (
    AddRing,
    CloseSockets,
    Drain,
    FromWorker,
    Outlive,
    RemoveRing,
    SetGuardCells,
    SetSockets,
    SetTable,
)
from relay.rules import Leg, Output, Rule, limits_of
from relay.supervisor import room
from relay.supervisor.egress import EgressKey, open_egress
from relay.supervisor.exclusive import Exclusive
from relay.supervisor.health import Lives, Pulse
from relay.supervisor.ingress import (
    FRAME_BYTES,
    Fanout,
    attach_filter,
    count_filled,
    is_bound,
    open_ring,
    take_ring_drops,
)
from relay.supervisor.interfaces import Interface
from relay.supervisor.keeper import Descriptor
from relay.supervisor.membership import Memberships
from relay.supervisor.orphans import VERSION as INVENTORY_VERSION
from relay.supervisor.orphans import (
    Inventory,
    KeptRing,
    Orphans,
    Predecessor,
    boot_id,
    copies_name,
    kept_memberships,
    kept_template,
    kept_worker,
    membership_name,
    ring_name,
    stats_name,
)
from relay.supervisor.plan import Plan, PlannedRule, make_plan
from relay.supervisor.protections import Protections

WAITING_MAX = 1024  # messages to one worker that does not read: three times what the largest change takes


class Numbers:
    """Hands out the smallest free numbers of a range; given back, they are free again."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._next = 0
        self._free: list[int] = []

    def take(self) -> int:
        """A free number. Raises RuleError when the range is used up."""
        if self._free:
            return self._free.pop()
        if self._next == self._limit:
            raise RuleError(f"more than {self._limit} at once: remove rules first")
        self._next += 1
        return self._next - 1

    def reserve(self, numbers: Collection[int]) -> None:
        """At the beginning: these are in use."""
        self._next = max(numbers, default=-1) + 1
        self._free = [number for number in range(self._next) if number not in numbers]

    def left(self) -> int:
        """How many are free."""
        return len(self._free) + self._limit - self._next

    def give_back(self, numbers: Iterable[int]) -> None:
        """Free numbers that nothing uses any more."""
        self._free += numbers


@dataclass
class Worker:
    """The supervisor's side of one worker, over all its restarts."""

    core: int
    stats: StatsSegment
    logs: SharedMemoryLogManager
    copies: Copies
    rings: dict[int, socket.socket] = field(default_factory=dict)  # by ring number
    channel: Channel[FromWorker] | None = None
    pid: int = 0
    restarts: int = 0
    running: bool = False
    started_s: float = 0.0
    generation: int = -1
    pulse: Pulse = field(default_factory=Pulse)
    lives: Lives = field(default_factory=Lives)
    outlives: bool = False  # the process was told to
    hangs: bool = False  # the process was found to, and is being killed
    is_excluded: bool = False  # has no rings: others get its share of the traffic
    predecessor: Predecessor | None = None  # a former supervisor's worker on this core, which still reads the rings
    waiting: deque[tuple[msgspec.Struct, list[int]]] = field(default_factory=deque)  # with descriptors of their own
    is_out_of_step: bool = False  # a message is lost to it: it must be replaced, the next gets everything

    def forget_place(self, ring_number: int) -> None:
        """The ring is no more: what is read under its number next is another."""
        self.stats.header["ring_sent"][ring_number] = 0
        self.copies.forget(ring_number)

    def sign_of_life(self) -> tuple[int, int]:
        """What changes as long as the worker's loop goes round: by the clock, and by what it sends."""
        return int(self.stats.header["heartbeat_ns"]), int(self.stats.header["sends"])

    def send(self, message: msgspec.Struct, descriptors: Sequence[int] = ()) -> None:
        """Send to the worker and ring its doorbell; what finds no room waits until `flush`.

        One that is gone is dealt with when its exit is told.
        """
        if self.is_out_of_step:
            return
        if self.waiting or not self._has_sent(message, descriptors):
            self._put_off(message, descriptors)
        self.stats.ring_doorbell()

    def flush(self) -> None:
        """Send what waits, as far as there is room. In order: a table must not come before its sockets."""
        if not self.waiting:
            return
        while self.waiting and self._has_sent(*self.waiting[0]):
            _, descriptors = self.waiting.popleft()
            for descriptor in descriptors:
                os.close(descriptor)
        self.stats.ring_doorbell()

    def _has_sent(self, message: msgspec.Struct, descriptors: Sequence[int]) -> bool:
        assert self.channel is not None
        try:
            with contextlib.suppress(ChannelClosedError):
                self.channel.send(message, list(descriptors))
        except BlockingIOError:
            return False
        return True

    def _put_off(self, message: msgspec.Struct, descriptors: Sequence[int]) -> None:
        """Keep a message with descriptors of its own: the caller's may be closed before there is room."""
        own: list[int] = []
        self.waiting.append((message, own))
        try:
            for descriptor in descriptors:
                own.append(os.dup(descriptor))
            is_kept = len(self.waiting) <= WAITING_MAX
        except OSError:  # too many are open
            is_kept = False
        if not is_kept:
            self.forget()
            self.is_out_of_step = True

    def forget(self) -> None:
        """Nothing waits any more: the process is gone, or must go."""
        for _, descriptors in self.waiting:
            for descriptor in descriptors:
                os.close(descriptor)
        self.waiting.clear()
        self.is_out_of_step = False


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


@dataclass
class Retired:
    """What the former table used and the new one does not."""

    sockets: dict[int, socket.socket] = field(default_factory=dict)
    rings: list[int] = field(default_factory=list)
    rule_slots: list[int] = field(default_factory=list)
    limit_slots: list[int] = field(default_factory=list)  # of rules whose limits are others
    output_slots: list[int] = field(default_factory=list)
    protections: list[int] = field(default_factory=list)


class Fleet:
    """All workers and what they share."""

    def __init__(
        self,
        cores: Sequence[int],
        instance: str | None,
        owner: tuple[int, int],
        default_interfaces: Sequence[str],
        ring_bytes: int,
        fanout: Fanout,
        levels: LevelPolicy,
        exclusive: Exclusive | None = None,
        orphans: Orphans | None = None,
    ) -> None:
        self.default_interfaces = default_interfaces
        self.plan = Plan()
        self.generation = 0
        self.output_slots: dict[tuple[str, Output], int] = {}
        self.rule_slots: dict[str, int] = {}
        self.workers: list[Worker] = []
        self._ring_bytes = ring_bytes
        self._fanout = fanout
        self._exclusive = exclusive
        self._orphans = orphans
        self._orphaned: dict[tuple[str, bool, int], KeptRing] = {}  # not adopted yet
        self.revision = 0  # of what `kept` and `inventory` tell
        self._rings: dict[RingKey, Ring] = {}
        self._admitted: dict[RingKey, set[Place]] = {}  # by the filters that rings have now
        self.protections = Protections()
        self._reader: int | None = None  # the core of the worker that reads protected inputs, of all interfaces
        self._ring_numbers = Numbers(layout.RINGS_MAX)
        self._rule_numbers = Numbers(layout.RULES_MAX)
        self._output_numbers = Numbers(layout.OUTPUTS_MAX)
        self._socket_numbers = Numbers(layout.OUTPUTS_MAX)
        self._egress: dict[EgressKey, tuple[int, socket.socket]] = {}
        self._memberships = Memberships()
        self._refusals: set[str] = set()  # of the kernel, by the last `begin`
        if orphans is not None:
            self._adopt(orphans)
        self._retired = Retired()
        self._table = compile_table((), (), 0)
        self._guard_cells = GuardCells()
        try:
            for core in cores:
                logs = SharedMemoryLogManager.create_for_worker(
                    core, instance, *owner, formats=events.FORMATS, limits=events.LIMITS, levels=levels
                )
                try:
                    stats = StatsSegment.create(core, instance, *owner)
                except BaseException:
                    logs.shutdown()
                    raise
                try:
                    copies = (orphans and orphans.take_copies(core)) or Copies.create()
                except BaseException:
                    stats.close()
                    logs.shutdown()
                    raise
                self.workers.append(Worker(core, stats, logs, copies))
                if orphans is not None:
                    self.workers[-1].predecessor = orphans.predecessors.get(core)
        except BaseException:
            self.close()
            raise

    def _adopt(self, orphans: Orphans) -> None:
        """Go on with what a former supervisor joined and held; its rings are adopted as rules want them."""
        kept = orphans.inventory
        self._memberships.adopt(orphans.take_memberships(kept.joined), orphans.take_memberships(kept.held))
        self._orphaned = {(ring.interface, ring.reader is not None, ring.ifindex): ring for ring in kept.rings}
        self._ring_numbers.reserve({ring.number for ring in kept.rings})
        self._reader = next((ring.reader for ring in kept.rings if ring.reader is not None), None)

    # --- rules ------------------------------------------------------------------------------------

    def begin(self, rules: Sequence[Rule], interfaces: Mapping[str, Interface], strict: bool) -> list[str]:
        """Go over to `rules`; return warnings. `finish` follows when `is_confirmed`.

        Raises RelayError when the kernel refuses a socket and `strict`; nothing has changed then. Otherwise
        the output waits and the refusal is a warning, once as long as it stands.
        """
        plan = make_plan(rules, interfaces, self.default_interfaces)
        self._check_room(plan)
        refusals: list[str] = []
        opened = self._open_egress(plan, strict, refusals)
        self._egress |= opened
        self._retire(plan)
        self._replace_rings(plan, refusals)
        self.generation += 1
        self.plan = plan
        self._table = self._compiled(moved=True)
        for worker in self.workers:
            if worker.running:
                self._hand_sockets(worker, dict(opened.values()))
                self._hand_table(worker)
        refusals += self._memberships.update(plan.listens)
        self.revision += 1
        former, self._refusals = self._refusals, set(refusals)
        return refusals if strict else [refusal for refusal in refusals if refusal not in former]

    @property
    def is_incomplete(self) -> bool:
        """Whether the kernel refused something that the rules need: `begin` tries it again."""
        return bool(self._refusals)

    def waiting(self, rule_ids: Collection[str]) -> list[str]:
        """A warning for each of these rules that can't work yet."""
        return [
            f"rule {planned.rule.rule_id} is {planned.state}"
            for planned in self.plan.rules
            if planned.rule.rule_id in rule_ids and planned.state != "active"
        ]

    def is_confirmed(self) -> bool:
        """Whether every running worker uses the current table."""
        return all(worker.generation == self.generation for worker in self.workers if worker.running)

    def finish(self) -> list[str]:
        """Close and free what only the former table used, and admit what the new one relays; return warnings."""
        retired, self._retired = self._retired, Retired()
        for worker in self.workers:
            if worker.running and retired.sockets:
                numbers = tuple(retired.sockets)
                for at in range(0, len(numbers), DESCRIPTORS_MAX):
                    worker.send(CloseSockets(numbers[at : at + DESCRIPTORS_MAX]))
            worker.stats.rules[retired.rule_slots] = 0
            worker.stats.outputs[retired.output_slots] = 0
        self._guard_cells.fill([*retired.rule_slots, *retired.limit_slots])
        for sock in retired.sockets.values():
            sock.close()
        has_moved = any(self._moved_from(key) for key in self._rings)
        self._set_filters()
        self._end_rings()
        if has_moved:
            self.generation += 1
            self._table = self._compiled(moved=False)
            for worker in self.workers:
                if worker.running:
                    self._hand_table(worker)
        self.protections.give_back(retired.protections)
        self._ring_numbers.give_back(retired.rings)
        self._socket_numbers.give_back(retired.sockets)
        self._rule_numbers.give_back(retired.rule_slots)
        self._output_numbers.give_back(retired.output_slots)
        return self._keep_from_host(self.plan)

    def egress_keys(self) -> Collection[EgressKey]:
        """What the open egress sockets are for."""
        return self._egress.keys()

    def _check_room(self, plan: Plan) -> None:
        """Raises RuleError when the numbers in use until `finish` leave too few for what is new."""
        rule_ids = {planned.rule.rule_id for planned in plan.rules}
        outputs = {(p.rule.rule_id, planned.output) for p in plan.rules for planned in p.outputs}
        room = (self._rule_numbers.left(), self._output_numbers.left(), self._socket_numbers.left())
        new = (
            len(rule_ids - set(self.rule_slots)),
            len(outputs - set(self.output_slots)),
            len(plan.egress_keys() - set(self._egress)),
        )
        if any(wanted > left for wanted, left in zip(new, room, strict=True)):
            raise RuleError("too many rules or outputs change at once: change them in several steps")
        self.protections.check_room(_protected(plan))

    def _open_egress(self, plan: Plan, strict: bool, warnings: list[str]) -> dict[EgressKey, tuple[int, socket.socket]]:
        opened: dict[EgressKey, tuple[int, socket.socket]] = {}
        refused: dict[EgressKey, str] = {}
        missing = plan.egress_keys() - set(self._egress)
        room_left = room.left() - self._memberships.sockets_wanted(plan.listens) if missing else 0
        for key in missing:
            try:
                if len(opened) >= room_left:
                    raise RelayError(
                        f"output {endpoint(key.group, key.port)} on {key.interface}: {room.limit_now()} files may be "
                        f"open, and {room.RESERVE} are kept for the relay itself: {room.REMEDY}"
                    )
                sock = open_egress(key)
            except RelayError as error:
                if strict:
                    self._socket_numbers.give_back(number for number, _ in opened.values())
                    for _, sock in opened.values():
                        sock.close()
                    raise
                refused[key] = str(error)
            else:
                opened[key] = (self._socket_numbers.take(), sock)
        if refused:
            plan.refuse(refused)
            warnings += refused.values()
        return opened

    def _retire(self, plan: Plan) -> None:
        """Take leave of sockets and slots that `plan` has no use for, and take slots for what is new."""
        keys = plan.egress_keys()
        for key in [key for key in self._egress if key not in keys]:
            number, sock = self._egress.pop(key)
            self._retired.sockets[number] = sock
        rule_ids = {planned.rule.rule_id for planned in plan.rules}
        limits = {planned.rule.rule_id: limits_of(planned.rule) for planned in plan.rules}
        self._retired.limit_slots += [
            self.rule_slots[planned.rule.rule_id]
            for planned in self.plan.rules
            if limits_of(planned.rule) != limits.get(planned.rule.rule_id, "")
        ]
        outputs = {
            (planned.rule.rule_id, planned_output.output)
            for planned in plan.rules
            for planned_output in planned.outputs
        }
        for rule_id in [rule_id for rule_id in self.rule_slots if rule_id not in rule_ids]:
            self._retired.rule_slots.append(self.rule_slots.pop(rule_id))
        for output in [output for output in self.output_slots if output not in outputs]:
            self._retired.output_slots.append(self.output_slots.pop(output))
        for rule_id in rule_ids - set(self.rule_slots):
            self.rule_slots[rule_id] = self._rule_numbers.take()
        for output in outputs - set(self.output_slots):
            self.output_slots[output] = self._output_numbers.take()
        segments = [worker.stats for worker in self.workers]
        self._retired.protections += self.protections.follow(_protected(plan), segments)

    def _compiled(self, moved: bool) -> bytes:
        """The table of the plan; with `moved`, what goes from one ring to another is relayed from both."""
        left = {key: self._moved_from(key) for key in self._rings} if moved else {}
        table_rules = [rule for planned in self.plan.rules for rule in self._table_rules(planned, left)]
        return compile_table(table_rules, self._own_sources(), self.generation)

    def _table_rules(self, planned: PlannedRule, left: Mapping[RingKey, Collection[Place]]) -> Iterator[TableRule]:
        """A rule for each leg. Where several workers read it, a protected rule has its primary, and as it comes.

        So it is in rings that an input has `left`, and where the kernel has refused a ring for it.
        """
        for number, (leg, interfaces) in enumerate(planned.inputs):
            place = leg.group, leg.port
            keys = [key for name in interfaces if (key := self._key(name, place)) in self._rings]
            protection = self.protections.of_table(planned.rule, number)
            merged = [key for key in keys if key[1] or protection is None]
            plain = [key for key in keys if key not in merged]
            plain += [key for name, shared in keys if place in left.get(key := (name, not shared), ())]
            table_rule = self._table_rule(planned, leg, tuple(self._rings[key].number for key in merged))
            yield table_rule if protection is None else replace(table_rule, protection=protection)
            if plain and number == 0:
                yield replace(table_rule, rings=tuple(self._rings[key].number for key in plain))

    def _key(self, interface: str, place: Place) -> RingKey:
        """The ring of an interface that has an input."""
        is_protected = place in self.plan.protected.get(interface, ()) and (interface, True) in self._rings
        return interface, is_protected

    def _table_rule(self, planned: PlannedRule, leg: Leg, rings: tuple[int, ...]) -> TableRule:
        rule = planned.rule
        outputs = []
        for planned_output in planned.outputs:
            output, key = planned_output.output, planned_output.key
            outputs.append(
                TableOutput(
                    slot=self.output_slots[rule.rule_id, output],
                    address=output.group,
                    port=output.port,
                    socket=0 if key is None else self._egress[key][0],
                    gso_segment_bytes_max=0 if key is None else key.gso_segment_bytes_max,
                    connected=key is not None and key.is_connected,
                    ttl_decrement=output.ttl == "decrement",
                    waiting=key is None,
                    ifindex=0 if key is None else key.ifindex,
                )
            )
        return TableRule(
            slot=self.rule_slots[rule.rule_id],
            name=rule.rule_id,
            group=leg.group,
            port=leg.port,
            source=leg.source,
            rings=rings,
            preserve_source=rule.preserve_source,
            outputs=tuple(outputs),
            max_pps=rule.max_pps or 0,
            max_bps=rule.max_bps or 0,
        )

    def _own_sources(self) -> list[OwnSource]:
        return [
            OwnSource(
                address=None if key.preserve_source else key.address,
                port=sock.getsockname()[1],
                destination=key.group,
                destination_port=key.port,
            )
            for key, (_, sock) in self._egress.items()
        ]

    # --- rings ------------------------------------------------------------------------------------

    def _readers(self, ring: Ring) -> list[Worker]:
        return [worker for worker in self.workers if not worker.is_excluded and ring.reader in (None, worker.core)]

    def created_anew(self) -> set[str]:
        """Interfaces that are not those that their rings were opened on, though name and index may be the same.

        So it is after a visit to another network namespace, or when a tool asks for the index.
        """
        return {
            ring.interface
            for ring in self._rings.values()
            if not all(is_bound(worker.rings[ring.number]) for worker in self._readers(ring))
        }

    def has_lapsed_joins(self) -> bool:
        """Whether the kernel has dropped joins, which `begin` makes anew."""
        return bool(self._memberships.lapsed())

    def _replace_rings(self, plan: Plan, warnings: list[str]) -> None:
        """Open rings on interfaces that came, close those of interfaces that went.

        The ring of protected inputs that are none any more goes later (`_end_rings`): others may still want them.
        """
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
            self._close_ring(key, ring)
            for worker in self.workers:
                worker.forget_place(ring.number)
        wanted: list[RingKey] = [(name, False) for name in plan.rings]
        wanted += [(name, True) for name in plan.rings if name in plan.protected]
        for key in wanted:
            if key not in self._rings:
                try:
                    self._open_rings(key, plan.rings[key[0]])
                except RelayError as error:
                    warnings.append(str(error))
        for kept in self._orphaned.values():
            self._disown(kept)
            self._ring_numbers.give_back([kept.number])
        self._orphaned.clear()

    def _close_ring(self, key: RingKey, ring: Ring) -> None:
        for worker in self._readers(ring):
            if worker.running:
                worker.send(RemoveRing(ring.number))
            worker.rings.pop(ring.number).close()
        self._admitted.pop(key, None)
        self._retired.rings.append(ring.number)

    def _end_rings(self) -> None:
        """Close rings of protected inputs that are none any more. Workers relay what is in them first."""
        for key, ring in list(self._rings.items()):
            if ring.reader is not None and ring.interface not in self.plan.protected:
                del self._rings[key]
                self._close_ring(key, ring)
                self.revision += 1

    def _open_rings(self, key: RingKey, ifindex: int) -> None:
        name, is_protected = key
        kept = self._orphaned.pop((name, is_protected, ifindex), None)
        ring = Ring(self._ring_numbers.take() if kept is None else kept.number, name, ifindex)
        if is_protected:
            ring.reader = self._reader_of_protected().core
        if kept is None:
            for worker in self.workers:
                worker.forget_place(ring.number)
        sockets = [] if kept is None else self._adopt_ring(ring, kept)
        readers = self._readers(ring)
        mode = None if is_protected else self._fanout
        try:
            while len(sockets) < len(readers):
                sock, ring.fanout_id = open_ring(name, self._ring_bytes, mode, ring.fanout_id)
                sockets.append(sock)
        except RelayError:
            self._ring_numbers.give_back([ring.number])
            for sock in sockets:
                sock.close()
            raise
        self._rings[key] = ring
        for worker, sock in zip(readers, sockets, strict=True):
            worker.rings[ring.number] = sock
            if worker.running and worker.predecessor is None:
                self._hand_ring(worker, ring.number)

    def _reader_of_protected(self) -> Worker:
        """Who reads protected inputs: the worker of the lowest core that gets traffic, until it gets none."""
        able = {worker.core: worker for worker in self.workers if not worker.is_excluded}
        if self._reader not in able:
            self._reader = min(able)
        return able[self._reader]

    def _adopt_ring(self, ring: Ring, kept: KeptRing) -> list[socket.socket]:
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
        for worker in self.workers:
            worker.forget_place(kept.number)

    def _go_on_in(self, worker: Worker, ring: Ring) -> None:
        """Let a worker begin where its predecessor left off."""
        assert self._orphans is not None
        worker.stats.header["ring_sent"][ring.number] = self._orphans.place(worker.core, ring.number)
        if ring.reader is not None:
            former = self._orphans.kept.stats[worker.core]
            self.protections.inherit(worker.stats, former, with_counts=False)

    def _wanted_by(self, key: RingKey) -> set[Place]:
        """What a ring is to admit."""
        name, is_protected = key
        protected = self.plan.protected.get(name, set()) if (name, True) in self._rings else set()
        return protected if is_protected else self.plan.admitted[name] - protected

    def _moved_from(self, key: RingKey) -> set[Place]:
        """What a ring admits still, and its interface's other ring is to admit."""
        name, is_protected = key
        other = (name, not is_protected)
        return self._admitted.get(key, set()) & self._wanted_by(other) if other in self._rings else set()

    def _set_filters(self) -> None:
        """Let in what the plan has. What goes from one ring to another is in both for a moment, rather than in none."""
        wanted = {key: self._wanted_by(key) for key in self._rings}
        for name, is_protected in self._rings:
            key = (name, not is_protected)
            if moved := self._moved_from((name, is_protected)):
                self._attach(key, moved | wanted[key] | self._admitted.get(key, set()))
        for key, inputs in wanted.items():
            self._attach(key, inputs)

    def _attach(self, key: RingKey, inputs: set[Place]) -> None:
        program = bpf.assemble(inputs)
        for worker in self._readers(self._rings[key]):
            attach_filter(worker.rings[self._rings[key].number], program)
        self._admitted[key] = inputs

    def _keep_from_host(self, plan: Plan) -> list[str]:
        """Let the host's own stack have what is not relayed, and only that, if the relay is exclusive."""
        if self._exclusive is None:
            return []
        try:
            self._exclusive.apply(
                {(ring.interface, ring.ifindex): plan.admitted[ring.interface] for ring in self._rings.values()}
            )
        except RelayError as error:
            return [str(error)]
        return []

    def interface_names(self) -> dict[int, str]:
        """The interfaces of the rings, by ring number."""
        return {ring.number: ring.interface for ring in self._rings.values()}

    def inputs_of(self, planned: PlannedRule) -> Iterator[tuple[Leg, int]]:
        """Where a rule takes in: each leg with the number of each ring that it comes by."""
        for leg, interfaces in planned.inputs:
            place = leg.group, leg.port
            for name in interfaces:
                ring = self._rings.get(self._key(name, place))
                if ring is not None:
                    yield leg, ring.number

    def reader(self) -> Worker | None:
        """The worker that merges the legs of protected rules; None as long as there are none."""
        return next((worker for worker in self.workers if worker.core == self._reader), None)

    # --- a worker that keeps dying ----------------------------------------------------------------

    def exclude(self, worker: Worker) -> int | None:
        """Give a worker's share of the traffic to the others; return the frames lost by it, None without others."""
        if all(other.is_excluded for other in self.workers if other is not worker):
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
            self._retired.rings.append(ring.number)
            self._refusals.add(f"protected inputs of {ring.interface} have no ring")  # so it is tried again
            return
        heir = self._reader_of_protected()
        self.protections.inherit(heir.stats, former.stats, with_counts=True)
        heir.forget_place(ring.number)
        ring.reader, heir.rings[ring.number] = heir.core, sock
        if heir.running and heir.predecessor is None:
            self._hand_ring(heir, ring.number)

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
            self._hand_rings(worker)
        self.revision += 1

    def count_ring_drops(self) -> dict[tuple[int, str], int]:
        """Count the frames that the kernel dropped since the last call; return them by core and interface."""
        lost: dict[tuple[int, str], int] = {}
        for ring in self._rings.values():
            for worker in self._readers(ring):
                frames = take_ring_drops(worker.rings[ring.number])
                if frames:
                    worker.stats.add_ring_full(frames)
                    lost[worker.core, ring.interface] = lost.get((worker.core, ring.interface), 0) + frames
        return lost

    # --- what outlives this supervisor ------------------------------------------------------------

    def kept(self) -> dict[str, Descriptor]:
        """What the next supervisor goes on with, by name."""
        kept: dict[str, Descriptor] = {
            ring_name(number, worker.core): sock for worker in self.workers for number, sock in worker.rings.items()
        }
        kept |= {stats_name(worker.core): worker.stats for worker in self.workers}
        kept |= {copies_name(worker.core): worker.copies for worker in self.workers}
        for memberships in (self._memberships.joined, self._memberships.held):
            kept |= {membership_name(sock): sock for sock in memberships.values()}
        return kept

    def let_outlive(self) -> None:
        """All is kept: workers that run go on when this supervisor is gone."""
        for worker in self.workers:
            if worker.running and not worker.outlives:
                worker.send(Outlive())
                worker.outlives = True

    def tell_restart(self) -> None:
        """This supervisor goes in a moment, and another comes: no reason for a warning."""
        for worker in self.workers:
            if worker.running and worker.outlives:
                worker.send(Outlive(is_restart=True))

    def inventory(self, template_pid: int) -> Inventory:
        """What the next supervisor must know of them, and of the workers."""
        return Inventory(
            version=INVENTORY_VERSION,
            boot_id=boot_id(),
            supervisor=os.getpid(),
            template=kept_template(template_pid),
            ring_bytes=self._ring_bytes,
            fanout=int(self._fanout),
            cores=tuple(worker.core for worker in self.workers),
            workers=tuple(kept_worker(worker.core, worker.pid) for worker in self.workers if worker.pid),
            rings=tuple(
                KeptRing(ring.number, ring.interface, ring.ifindex, ring.fanout_id or 0, ring.reader)
                for ring in self._rings.values()
                if ring.fanout_id is not None or ring.reader is not None
            ),
            joined=kept_memberships(self._memberships.joined),
            held=kept_memberships(self._memberships.held),
        )

    # --- workers ----------------------------------------------------------------------------------

    def worker_spawned(self, worker: Worker, pid: int) -> None:
        """A worker has a process."""
        worker.pid = pid
        self.revision += 1

    def worker_started(self, worker: Worker) -> None:
        """Hand a new worker everything that its predecessor had: rings last, as they may hold frames already."""
        worker.running = True
        worker.started_s = time.monotonic()
        worker.pulse.begin(worker.started_s)
        self._hand_sockets(worker, dict(self._egress.values()))
        worker.send(SetGuardCells(), [self._guard_cells.fileno()])
        self._hand_table(worker)
        if worker.predecessor is None:
            self._hand_rings(worker)
        self.revision += 1

    def inherit_rings(self, worker: Worker) -> None:
        """A predecessor has ended: go on where it left off."""
        worker.predecessor = None
        for ring in self._rings.values():
            if ring.is_adopted and worker in self._readers(ring):
                self._go_on_in(worker, ring)
        if worker.running:
            self._hand_rings(worker)
        self.revision += 1

    def worker_gone(self, worker: Worker) -> None:
        """Forget a worker's process; its rings stay open, and what it made of the rate guard's buckets ends with it."""
        guarded = [planned.rule.rule_id for planned in self.plan.rules if limits_of(planned.rule)]
        self._guard_cells.fill([self.rule_slots[rule_id] for rule_id in guarded])
        if worker.channel is not None:
            worker.channel.close()
        worker.channel = None
        worker.forget()
        worker.running = worker.outlives = worker.hangs = False
        worker.pid = 0

    def flush(self) -> bool:
        """Send what waits for workers that have a process; whether anything still waits."""
        for worker in self.workers:
            if worker.channel is not None:
                worker.flush()
        return any(worker.waiting for worker in self.workers)

    def close_channels(self) -> None:
        """Tell every worker to finish what its rings hold and end."""
        for worker in self.workers:
            if worker.channel is not None:
                worker.send(Drain())

    def _hand_rings(self, worker: Worker) -> None:
        if self._orphans is not None:
            self._orphans.follow(worker.core, worker.stats)
        for number in worker.rings:
            self._hand_ring(worker, number)

    def _hand_ring(self, worker: Worker, number: int) -> None:
        message = AddRing(number, FRAME_BYTES, self._ring_bytes // FRAME_BYTES)
        worker.send(message, [worker.rings[number].fileno()])

    def _hand_sockets(self, worker: Worker, sockets: Mapping[int, socket.socket]) -> None:
        numbers = list(sockets)
        for at in range(0, len(numbers), DESCRIPTORS_MAX):
            some = numbers[at : at + DESCRIPTORS_MAX]
            worker.send(SetSockets(tuple(some)), [sockets[number].fileno() for number in some])

    def _hand_table(self, worker: Worker) -> None:
        fd = publish(self._table)
        try:
            worker.send(SetTable(self.generation), [fd])
        finally:
            os.close(fd)

    def close(self) -> None:
        """Close every socket and unlink every segment."""
        for worker in self.workers:
            worker.forget()
            for sock in worker.rings.values():
                sock.close()
            worker.stats.close()
            worker.copies.close()
            worker.logs.shutdown()
        self._guard_cells.close()
        for _, sock in self._egress.values():
            sock.close()
        for sock in self._retired.sockets.values():
            sock.close()
        self._memberships.close()


def _protected(plan: Plan) -> list[Rule]:
    return [planned.rule for planned in plan.rules if planned.rule.secondary is not None]
