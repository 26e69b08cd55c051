"""The fleet: the workers, and all that is handed to them - rings (rings.py), egress sockets, rule tables.

Owned by the supervisor's thread. `begin` goes over to a new set of rules without a gap: sockets are opened
and handed out first, then the table that uses them. Once every worker has said that no packet is handled by
the old table any more, `finish` closes what only that one used and lets new traffic in.
"""

import os
import socket
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from logging_shm import LevelPolicy, SharedMemoryLogManager
from relay.addresses import endpoint
from relay.dataplane import events, layout
from relay.dataplane.copies import Copies
from relay.dataplane.counters import StatsSegment
from relay.dataplane.guard_cells import GuardCells
from relay.dataplane.table import OwnSource, TableOutput, TableRule, compile_table
from relay.descriptors import DESCRIPTORS_MAX
from relay.errors import RelayError, RuleError
from relay.messages import CloseSockets, Drain, Outlive, SetGuardCells
from relay.rules import Leg, Output, Rule, limits_of
from relay.supervisor import room
from relay.supervisor.egress import EgressKey, open_egress
from relay.supervisor.exclusive import Exclusive
from relay.supervisor.ingress import Fanout
from relay.supervisor.interfaces import Interface
from relay.supervisor.keeper import Descriptor
from relay.supervisor.membership import Memberships
from relay.supervisor.numbers import Numbers
from relay.supervisor.orphans import VERSION as INVENTORY_VERSION
from relay.supervisor.orphans import (
    Inventory,
    Orphans,
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
from relay.supervisor.rings import Place, RingKey, Rings
from relay.supervisor.worker import Worker


@dataclass
class Retired:
    """What the former table used and the new one does not."""

    sockets: dict[int, socket.socket] = field(default_factory=dict)
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
        self._revision = 0  # of what `kept` and `inventory` tell, but for the rings
        self.protections = Protections()
        self._rule_numbers = Numbers(layout.RULES_MAX)
        self._output_numbers = Numbers(layout.OUTPUTS_MAX)
        self._socket_numbers = Numbers(layout.OUTPUTS_MAX)
        self._egress: dict[EgressKey, tuple[int, socket.socket]] = {}
        self._memberships = Memberships()
        self._refusals: set[str] = set()  # of the kernel, by the last `begin`
        if orphans is not None:
            kept = orphans.inventory
            self._memberships.adopt(orphans.take_memberships(kept.joined), orphans.take_memberships(kept.held))
        self.rings = Rings(self.workers, ring_bytes, fanout, self._memberships, self.protections, exclusive, orphans)
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

    @property
    def revision(self) -> int:
        """Of what `kept` and `inventory` tell: another number whenever that is something else."""
        return self._revision + self.rings.revision

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
        self.rings.follow(plan, refusals)
        self.generation += 1
        self.plan = plan
        self._table = self._compiled(moved=True)
        for worker in self.workers:
            if worker.running:
                worker.hand_sockets(dict(opened.values()))
                worker.hand_table(self._table, self.generation)
        refusals += self._memberships.update(plan.listens)
        self._revision += 1
        former, self._refusals = self._refusals, set(refusals)
        return refusals if strict else [refusal for refusal in refusals if refusal not in former]

    def has_lapsed_joins(self) -> bool:
        """Whether the kernel has dropped joins, which `begin` makes anew."""
        return bool(self._memberships.lapsed())

    @property
    def is_incomplete(self) -> bool:
        """Whether the kernel refused something that the rules need: `begin` tries it again."""
        return bool(self._refusals) or self.rings.lacks_ring

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
        if self.rings.finish():
            self.generation += 1
            self._table = self._compiled(moved=False)
            for worker in self.workers:
                if worker.running:
                    worker.hand_table(self._table, self.generation)
        self.protections.give_back(retired.protections)
        self._socket_numbers.give_back(retired.sockets)
        self._rule_numbers.give_back(retired.rule_slots)
        self._output_numbers.give_back(retired.output_slots)
        return self.rings.keep_from_host()

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
        left = self.rings.moved() if moved else {}
        table_rules = [rule for planned in self.plan.rules for rule in self._table_rules(planned, left)]
        return compile_table(table_rules, self._own_sources(), self.generation)

    def _table_rules(self, planned: PlannedRule, left: Mapping[RingKey, Collection[Place]]) -> Iterator[TableRule]:
        """A rule for each leg. Where several workers read it, a protected rule has its primary, and as it comes.

        So it is in rings that an input has `left`, and where the kernel has refused a ring for it.
        """
        for number, (leg, interfaces) in enumerate(planned.inputs):
            place = leg.group, leg.port
            keys = [key for name in interfaces if (key := self.rings.key_of(name, place)) in self.rings]
            protection = self.protections.of_table(planned.rule, number)
            merged = [key for key in keys if key[1] or protection is None]
            plain = [key for key in keys if key not in merged]
            plain += [key for name, shared in keys if place in left.get(key := (name, not shared), ())]
            table_rule = self._table_rule(planned, leg, tuple(self.rings.number(key) for key in merged))
            yield table_rule if protection is None else replace(table_rule, protection=protection)
            if plain and number == 0:
                yield replace(table_rule, rings=tuple(self.rings.number(key) for key in plain))

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
            rings=self.rings.kept(),
            joined=kept_memberships(self._memberships.joined),
            held=kept_memberships(self._memberships.held),
        )

    # --- workers ----------------------------------------------------------------------------------

    def worker_spawned(self, worker: Worker, pid: int) -> None:
        """A worker has a process."""
        worker.pid = pid
        self._revision += 1

    def worker_started(self, worker: Worker) -> None:
        """Hand a new worker everything that its predecessor had: rings last, as they may hold frames already."""
        worker.running = True
        worker.started_s = time.monotonic()
        worker.pulse.begin(worker.started_s)
        worker.hand_sockets(dict(self._egress.values()))
        worker.send(SetGuardCells(), [self._guard_cells.fileno()])
        worker.hand_table(self._table, self.generation)
        if worker.predecessor is None:
            self.rings.hand(worker)
        self._revision += 1

    def inherit_rings(self, worker: Worker) -> None:
        """A predecessor has ended: go on where it left off."""
        worker.predecessor = None
        self.rings.inherit(worker)
        self._revision += 1

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
