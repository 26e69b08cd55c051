"""The supervisor: starts everything, hands out sockets, keeps the counters, and ends everything.

One thread waits on one selector: signals, the control plane's stream, the template's and the workers'
channels, interface changes, and timers. A second thread drains the log rings. It never parses bytes from
outside: clients talk to the control plane, which is unprivileged.

    mcrd ─┬─ control plane                  (link.py)
          └─ template ─┬─ worker core 0     (nursery.py)
                       └─ worker core 1
"""

import contextlib
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from logging_shm import Facility, LevelPolicy, SharedSPSCRingBuffer, SupervisorLogging
from logging_shm.facility import segment_name
from relay import config
from relay.config import Options, Origin
from relay.errors import ExitCode, PreflightError, RelayError
from relay.messages import (
    ApplyRules,
    Configure,
    Done,
    GetOptions,
    GetStats,
    Levels,
    ListWorkers,
    LogLevel,
    Ready,
    Refused,
    Restart,
    StartedWith,
    Workers,
)
from relay.privileges import keep_for_supervising, resolve_trusted_group
from relay.rules import Rule
from relay.supervisor import levels, segments
from relay.supervisor.changes import Change, Changes
from relay.supervisor.egress_watch import EgressWatch
from relay.supervisor.exclusive import Exclusive
from relay.supervisor.fleet import Fleet
from relay.supervisor.guards import GuardWatch
from relay.supervisor.handover import Handover
from relay.supervisor.ingress import Fanout
from relay.supervisor.interface_watch import InterfaceWatch
from relay.supervisor.keeper import Keeper
from relay.supervisor.link import ControlPlaneLink
from relay.supervisor.listener import listening, prepare_place
from relay.supervisor.logs import LogDrain
from relay.supervisor.nursery import Nursery
from relay.supervisor.orphans import LISTENER, claim, end, take_over
from relay.supervisor.protection_watch import ProtectionWatch
from relay.supervisor.restart import Restarter
from relay.supervisor.rulebook import RuleBook
from relay.supervisor.sampling import Sampler
from relay.supervisor.service import ServiceManager
from relay.supervisor.stalls import StallWatch
from relay.supervisor.state import state_file
from relay.supervisor.timers import Timers
from relay.supervisor.worker import Worker
from relay.wording import counted

TICK_S = 1.0
STOP_S_MAX = 1.5  # for rings to be emptied at the end; the whole stop takes under 2 s
CONTROL_PLANE_LINES = (100, 500)  # a second, and at once: a client that floods it floods no log
ENDING = (signal.SIGINT, signal.SIGTERM)
SIGNALS = (*ENDING, signal.SIGHUP)

Reload = Callable[[], tuple[Options, Sequence[Rule]]]


class Supervisor:
    """Everything between a start and a stop."""

    def __init__(
        self,
        options: Options,
        rules: Sequence[Rule],
        cores: Sequence[int],
        owner: tuple[int, int],
        reload: Reload,
        origin: Origin,
    ) -> None:
        self._options = options
        self._origin = origin
        self._cores = cores
        self._owner = owner
        self._reload = reload
        self._stack = contextlib.ExitStack()
        self._selector = selectors.DefaultSelector()
        self._timers = Timers()
        self._egress_watch = EgressWatch()
        self._stopping = False
        self._failed = False
        self._restarting = False
        self._control_socket = config.socket_path(options.socket, options.instance)
        state = Path(options.state) if options.state else None
        self._book = RuleBook(rules, state_file(state, self._control_socket))
        self._published = (-1, 0)  # revision, template

    # --- life -------------------------------------------------------------------------------------

    def run(self) -> int:
        """Run until told to stop; return the exit code. Raises RelayError when starting fails."""
        # Whoever says to stop while former workers are taken over wants them to end, too: that waits until it can be.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        with self._stack:
            with segments.explained():
                self._open_logs()
            self._open_sockets()
            self._start()
            try:
                while not self._stopping:
                    self._turn()
                if self._restarting:
                    self._start_anew()
            except Exception as error:
                self._log.critical(
                    f"The supervisor failed, workers go on relaying, the next mcrd takes over: {error!r}"
                )
                self._log_drain.stop()
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(ExitCode.FAILURE)  # as if killed: nothing is closed, nothing removed
            self._stop()
        return ExitCode.FAILURE if self._failed else ExitCode.OK

    def _open_logs(self) -> None:
        """Take hold of the instance's name: its segments, which tell a second relay that this one runs."""
        options, (uid, gid) = self._options, self._owner
        fanout, ring_bytes = Fanout[options.fanout], options.ring_mib << 20
        claimed = claim(self._control_socket)
        if claimed is not None:
            self._stack.callback(os.close, claimed)
        segments.refuse_living(options.instance, uid)
        prepare_place(self._control_socket)
        lines = self._find_former(ring_bytes, fanout)
        pids, adopted = {os.getpid()}, set[int]()
        if self._orphans is not None:
            pids |= self._orphans.pids()
            adopted = self._orphans.stats_identities()
        stale = segments.remove_stale(options.instance, uid, orphans=pids, adopted=adopted)
        logging = self._stack.enter_context(SupervisorLogging(options.instance))
        self._log = logging.logger(Facility.Supervisor)
        name = segment_name(Facility.ControlPlane, instance=options.instance)
        control_plane = SharedSPSCRingBuffer.create(
            name, facility=Facility.ControlPlane, uid=uid, gid=gid, instance=options.instance
        )
        self._stack.enter_context(control_plane)
        control_plane.segment.limit(0, *CONTROL_PLANE_LINES)
        self._levels = LevelPolicy(levels.parse_level(options.log_level))
        self._exclusive = Exclusive(options.instance) if options.exclusive else None
        if self._exclusive is not None:
            self._stack.callback(self._exclusive.close)
        self._fleet = Fleet(
            self._cores,
            options.instance,
            self._owner,
            options.interfaces,
            ring_bytes,
            fanout,
            self._levels,
            self._exclusive,
            self._orphans,
        )
        self._stack.callback(self._fleet.close)
        self._log_rings = [logging.rings[Facility.Supervisor], control_plane]
        self._levels.apply(self._log_rings)
        self._log_rings += [ring for worker in self._fleet.workers for ring in worker.logs.rings.values()]
        self._log_drain = LogDrain(config.sinks(options), self._log_rings, stale, self._log)
        if self._orphans is None:
            self._log_drain.stale_ended()
        keep_for_supervising()
        self._log_drain.start()
        self._stack.callback(self._log_drain.stop)
        self._log.info("Starting MCR supervisor")
        if stale.names:
            is_restart = self._orphans is not None and self._orphans.inventory.supervisor == os.getpid()
            whose = "this supervisor before its restart" if is_restart else "a killed supervisor"
            rescued = counted(stale.unread, "record")
            self._log.notice(f"Removed {counted(len(stale.names), 'segment')} of {whose}, {rescued} rescued")
        for line in lines:
            self._log.notice(line)
        self._restarter = Restarter(self._timers, self._obstacle_to_restart)

    def _find_former(self, ring_bytes: int, fanout: Fanout) -> list[str]:
        """Take over what a killed supervisor left, running or written down; return lines about it."""
        lines = self._book.load()
        self._orphans, orphaned = take_over(
            self._control_socket, self._options.instance, self._cores, ring_bytes, int(fanout)
        )
        if self._orphans is not None:
            self._stack.callback(self._orphans.abandon)
        return [*lines, *orphaned]

    def _open_sockets(self) -> None:
        """Open the control socket, what wakes the loop, and the rings, which fill from now on."""
        path, orphans = self._control_socket, self._orphans
        adopted = orphans.take_listener(path) if orphans is not None else None
        trusted_gid = resolve_trusted_group(self._options.socket_group)
        self._listener = self._stack.enter_context(
            listening(path, self._log, self._options.socket_mode, trusted_gid, adopted)
        )
        self._keeper = Keeper(path)
        self._stack.callback(lambda: self._keeper.close(former_stays=self._orphans is not None))
        self._watch = self._stack.enter_context(InterfaceWatch(self._log, self._selector, self._fleet))
        self._service = ServiceManager(self._timers, self._is_ready, self._status)
        self._stack.callback(self._service.close)
        self._wakeup = self._stack.enter_context(_signal_socket())
        self._selector.register(self._wakeup, selectors.EVENT_READ, self._on_signals)
        rules = tuple(self._book.rules.values())
        self._log_warnings(self._fleet.begin(rules, self._watch.interfaces, strict=not rules))
        for refusal in self._fleet.finish():
            raise PreflightError(f"{refusal}: start without --exclusive")
        self._changes = Changes(self._fleet)
        self._watch.follow(self._changes, self._book)
        self._sampler = Sampler(self._fleet)
        self._stalls = StallWatch(self._fleet, self._log)
        self._guards = GuardWatch(self._fleet, self._log)
        self._protection = ProtectionWatch(self._fleet, self._log)
        loop, options = (self._log, self._selector, self._timers), self._options
        self._link = ControlPlaneLink(
            *loop, self._listener, self._owner, options.instance, self._greeting, self._obey, trusted_gid
        )
        self._handover: Handover | None = None
        if orphans is not None:
            self._handover = Handover(orphans, self._fleet, *loop, self._on_handed_over)
        manner = (options.idle, options.stream_health)
        self._nursery = Nursery(
            self._fleet, *loop, self._owner, options.instance, manner, self._keeper, self._on_worker_started
        )

    def _start(self) -> None:
        self._link.start()
        self._nursery.start()
        for worker in self._fleet.workers:
            self._log.info(f"Spawning Data Plane worker for core {worker.core}", core=worker.core)
        self._timers.after(TICK_S, self._tick)
        self._timers.after(self._stalls.period_s(), self._watch_stalls)
        self._timers.after(self._protection.period_s(), self._watch_protection)
        if self._options.stats_interval_s:
            self._timers.after(self._options.stats_interval_s, self._report_again)
        self._service.start()

    def _turn(self) -> None:
        """Wait for the next event and deal with it."""
        until_s = min(self._timers.next_s(), self._changes.deadline_s())
        for key, _ in self._selector.select(max(until_s - time.monotonic(), 0)):
            key.data()
        self._link.watch(self._give_up)
        self._nursery.watch(self._give_up)
        self._timers.run_due()
        self._changes.settle()
        self._publish()
        self._service.look()

    def _is_ready(self) -> bool:
        """Clients are served, and every worker runs that gets traffic."""
        return self._nursery.is_open and all(worker.running or worker.is_excluded for worker in self._fleet.workers)

    def _status(self) -> str:
        """One line for a service manager."""
        workers = self._sampler.workers()
        states = [planned.state for planned in self._fleet.plan.rules]
        waiting = len(states) - states.count("active")
        return (
            f"{counted(len(states), 'rule')}{f' ({waiting} waiting)' if waiting else ''}, "
            f"{counted(len(workers), 'worker')}, "
            f"{sum(w.packets_per_second for w in workers):.0f} packets/s, "
            f"{sum(w.bits_per_second for w in workers):.0f} bit/s"
        )

    def _publish(self) -> None:
        """Have the next supervisor find what this one has open, whenever that has changed.

        During a hand-over it would still be the former template that it must find.
        """
        if self._handover is not None:
            return
        revision = (self._fleet.revision, self._nursery.template_pid)
        if revision == self._published:
            return
        kept = {LISTENER: self._listener, **self._fleet.kept()}
        try:
            self._keeper.publish(kept, self._fleet.inventory(self._nursery.template_pid))
        except RelayError as error:
            self._log.error(str(error))
        if self._keeper.is_complete(kept):
            self._published = revision
            self._fleet.let_outlive()
            self._let_former_go()

    def _on_worker_started(self, worker: Worker) -> None:
        if self._handover is not None:
            self._handover.begin(worker)

    def _on_handed_over(self) -> None:
        """The former workers are gone: the next supervisor is to find these now."""
        self._handover = None
        self._publish()

    def _let_former_go(self) -> None:
        """All is kept by the template of this supervisor: nobody needs the former one any more."""
        if self._orphans is None:
            return
        orphans, self._orphans = self._orphans, None
        orphans.close()
        self._log_drain.stale_ended()

    def _give_up(self) -> None:
        """End: a process that this relay needs can't be started."""
        self._failed = self._stopping = True

    def _start_anew(self) -> None:
        """Become the program that is installed now. Workers relay meanwhile, clients wait at the control socket.

        Returns when a signal has said to stop before. One that comes later waits for the new program.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        self._on_signals()
        if not self._restarting:
            return
        self._log.notice("Starting anew: workers go on relaying")
        self._service.reloading()
        self._link.stop()
        self._log_drain.stop()
        if self._exclusive is not None:
            self._exclusive.close()
        self._fleet.tell_restart()
        self._restarter.execute()

    def _stop(self) -> None:
        """End the workers when their rings are empty, then the control plane; nobody outlives this."""
        self._service.stopping()
        if self._orphans is not None:
            end(self._orphans.predecessors.values())
            self._orphans.close()
            self._orphans = None
        self._nursery.stop(time.monotonic() + STOP_S_MAX)
        self._link.stop()
        self._restarter.stop()
        if not self._options.state and not self._failed:
            self._book.remove_file()
        self._report()
        self._log.info("Shutting down...")

    # --- what happens -----------------------------------------------------------------------------

    def _on_signals(self) -> None:
        try:
            numbers = self._wakeup.recv(4096)
        except BlockingIOError:
            return
        for number in numbers:
            if number in ENDING:
                self._stopping, self._restarting = True, False
            elif number == signal.SIGHUP:
                self._service.reloading()
                self._reconfigure()
                self._service.reloaded()

    def _reconfigure(self) -> None:
        """Read the configuration again and let the control plane install its rules; open log files anew."""
        self._log_drain.reopen()
        try:
            options, rules = self._reload()
        except RelayError as error:
            self._log.error(f"Configuration not changed: {error}")
            return
        self._log.notice(f"Configuration read again: {counted(len(rules), 'rule')}")
        if options != self._options:
            self._log.warning("Options other than rules have changed: they take effect at the next start")
        self._book.configured = tuple(rules)
        self._link.tell(Configure(self._book.configured))

    def _tick(self) -> None:
        """Once a second: what the kernel dropped, and a sample for the rates."""
        self._timers.after(TICK_S, self._tick)
        for (core, interface), frames in self._fleet.rings.count_drops().items():
            self._log.warning(
                f"Ring of {interface} full: {counted(frames, 'frame')} lost on core {core}", core=core, iface=interface
            )
        for line in self._egress_watch.look(self._fleet.generation, self._fleet.egress_keys()):
            self._log.warning(line)
        self._watch.retry()
        self._guards.look()
        self._sampler.tick()

    def _watch_stalls(self) -> None:
        self._stalls.look()
        self._timers.after(self._stalls.period_s(), self._watch_stalls)

    def _watch_protection(self) -> None:
        self._protection.look()
        self._timers.after(self._protection.period_s(), self._watch_protection)

    def _report_again(self) -> None:
        self._timers.after(self._options.stats_interval_s, self._report_again)
        self._report()

    def _report(self) -> None:
        """The stats line: all workers together. Rules are for get-stats: ten thousand would be too many here."""
        workers = self._sampler.workers()
        dropped = sum(count for w in workers for cause, count in w.drops.items() if "errno" not in cause)
        self._log.info(
            f"Stats: in {sum(w.packets_in for w in workers)}, matched {sum(w.packets_matched for w in workers)}, "
            f"relayed {sum(w.packets_relayed for w in workers)}, dropped {dropped}, "
            f"{sum(w.packets_per_second for w in workers):.0f} packets/s, "
            f"{sum(w.bits_per_second for w in workers):.0f} bit/s"
        )

    def _log_warnings(self, warnings: list[str]) -> None:
        for warning in warnings:
            self._log.warning(warning)

    # --- what the control plane asks --------------------------------------------------------------

    def _greeting(self) -> Iterator[msgspec.Struct]:
        return self._book.greeting(self._options.interfaces)

    def _obey(self, request: object) -> None:
        """Carry out a request of the control plane."""
        match request:
            case Ready():
                self._nursery.open()
            case ApplyRules():
                self._apply(request)
            case GetStats():
                self._link.tell(self._sampler.stats(request.request_id))
            case GetOptions():
                options, origin = msgspec.to_builtins(self._options), self._origin
                self._link.tell(StartedWith(request.request_id, options, origin.command_line, origin.file))
            case ListWorkers():
                self._link.tell(Workers(request.request_id, self._sampler.workers()))
            case LogLevel():
                self._on_log_level(request)
            case Restart():
                self._on_restart(request)

    def _on_restart(self, request: Restart) -> None:
        epoch = self._link.epoch

        def agree() -> None:
            self._link.answer(epoch, Done(request.request_id))
            self._restarting = not self._stopping
            self._stopping = True

        def refuse(error: str) -> None:
            self._link.answer(epoch, Refused(request.request_id, error))

        self._restarter.begin(agree, refuse)

    def _obstacle_to_restart(self) -> str | None:
        """Why the next supervisor could not go on with everything now, None when it could."""
        if self._orphans is not None:
            return "former workers are still there"
        if not self._nursery.is_settled:
            return "the template or a worker still starts"
        if self._published != (self._fleet.revision, self._nursery.template_pid):
            return "the template has not yet taken what it is to keep"
        return None

    def _on_log_level(self, request: LogLevel) -> None:
        try:
            rings = levels.choose(self._log_rings, request.facility, request.core)
            if request.level is not None:
                self._levels.set(
                    levels.parse_level(request.level), levels.parse_facility(request.facility), request.core
                )
                self._levels.apply(self._log_rings)
                self._log.notice(f"Log level set to {request.level} for {counted(len(rings), 'ring')}")
        except RelayError as error:
            self._link.tell(Refused(request.request_id, str(error)))
            return
        self._link.tell(Levels(request.request_id, levels.of(rings)))

    def _apply(self, request: ApplyRules) -> None:
        """Queue a change of rules. Everything is checked again here: the control plane is less privileged."""
        former: dict[str, Rule] = {}
        epoch = self._link.epoch

        def begin() -> list[str]:
            if epoch != self._link.epoch:
                raise RelayError("the control plane that asked has ended")  # the next was told rules without these
            former.update(self._book.rules)
            wanted = self._book.after(request, self._options.interfaces)
            warnings = self._fleet.begin(tuple(wanted.values()), self._watch.interfaces, strict=True)
            if self._options.stream_health == "off":
                warnings += [
                    f"rule {r.rule_id}: no stall is seen with --stream-health off" for r in request.add if r.stall_ms
                ]
            self._book.adopt(wanted, request)
            return warnings + self._fleet.waiting({rule.rule_id for rule in request.add})

        def end(warnings: list[str]) -> None:
            for line, about in self._book.differences(former):
                self._log.notice(line, **about)
            try:
                self._book.save()
            except RelayError as error:
                warnings.append(str(error))
            self._log_warnings(warnings)
            self._link.answer(epoch, Done(request.request_id, tuple(warnings)))

        def refuse(error: str) -> None:
            self._link.answer(epoch, Refused(request.request_id, error))

        if self._changes.is_full:
            refuse("too many changes wait for their turn: try again")
            return
        self._changes.add(Change(begin, end, refuse))


@contextlib.contextmanager
def _signal_socket() -> Iterator[socket.socket]:
    """A socket from which the numbers of arriving signals can be read, so that the selector waits for them, too."""
    wakeup, signalled = socket.socketpair()
    with wakeup, signalled:
        wakeup.setblocking(False)
        signalled.setblocking(False)
        former = signal.set_wakeup_fd(signalled.fileno())
        for number in (*SIGNALS, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        try:
            yield wakeup
        finally:
            signal.set_wakeup_fd(former)
