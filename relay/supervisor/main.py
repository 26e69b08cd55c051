"""The supervisor: starts everything, hands out sockets, keeps the counters, and ends everything.

One thread waits on one selector: signals, the control plane's stream, the template's and the workers'
channels, interface changes, and a timer of one second. A second thread drains the log rings. It never parses bytes
from outside: clients talk to the control plane, which is unprivileged.

    mcrd ─┬─ control plane      (stream.py)
          └─ template ─┬─ worker core 0   (children.py, fleet.py)
                       └─ worker core 1
"""

import contextlib
import os
import resource
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from logging_shm import Drain, Facility, Severity, SharedSPSCRingBuffer, SupervisorLogging
from logging_shm.facility import segment_name
from relay import config
from relay.config import Options
from relay.descriptors import Channel, ChannelClosedError, channel_pair
from relay.errors import ExitCode, PreflightError, RelayError
from relay.messages import (
    ApplyRules,
    Configure,
    Done,
    Exited,
    FromTemplate,
    FromWorker,
    GetStats,
    Levels,
    ListWorkers,
    LogLevel,
    Ready,
    Refused,
    Restore,
    Spawn,
    Spawned,
    Started,
    TableInUse,
    TemplateReady,
    Workers,
)
from relay.rules import Rule, check_cycles, output_name, validate
from relay.supervisor import interfaces, segments
from relay.supervisor.children import start_control_plane, start_template
from relay.supervisor.fleet import Fleet, Worker
from relay.supervisor.ingress import Fanout
from relay.supervisor.sampling import Sampler
from relay.supervisor.stream import ControlPlaneStream, StreamBrokenError

TICK_S = 1.0
CONFIRM_S_MAX = 5.0  # a worker that does not go over to a new table in this time is reported
RESTART_DELAY_S = 0.5  # for a child that ended within this time of its start
STOP_S_MAX = 1.5  # for rings to be emptied at the end; the whole stop takes under 2 s
SOCKET_MODE = 0o666  # the control plane decides by SO_PEERCRED
DESCRIPTORS_WANTED = 1 << 20


@dataclass
class Change:
    """A change of rules or interfaces under way, or waiting for the one before it."""

    begin: Callable[[], list[str]]
    end: Callable[[list[str]], None]
    refuse: Callable[[str], None]
    warnings: list[str] = field(default_factory=list)
    deadline_s: float = 0.0


class Supervisor:
    """Everything between a start and a stop."""

    def __init__(
        self,
        options: Options,
        rules: Sequence[Rule],
        cores: Sequence[int],
        owner: tuple[int, int],
        reload: Callable[[], tuple[Options, Sequence[Rule]]],
    ) -> None:
        self._options = options
        self._configured = tuple(rules)
        self._configured_ids: tuple[str, ...] = ()
        self._cores = cores
        self._owner = owner
        self._reload = reload
        self._stack = contextlib.ExitStack()
        self._selector = selectors.DefaultSelector()
        self._rules: dict[str, Rule] = {}
        self._changes: deque[Change] = deque()
        self._change: Change | None = None
        self._timers: list[tuple[float, Callable[[], None]]] = []
        self._stopping = False
        self._failed = False
        self._control_plane: subprocess.Popen[bytes] | None = None
        self._stream: ControlPlaneStream | None = None
        self._control_plane_started_s = 0.0
        self._template: subprocess.Popen[bytes] | None = None
        self._template_channel: Channel[FromTemplate] | None = None
        self._template_ready = False
        self._control_plane_ready = False
        self._interfaces = interfaces.snapshot()

    # --- life -------------------------------------------------------------------------------------

    def run(self) -> int:
        """Run until told to stop; return the exit code. Raises RelayError when starting fails."""
        with self._stack:
            self._open()
            self._start()
            while not self._stopping:
                self._turn()
            self._stop()
        return ExitCode.FAILURE if self._failed else ExitCode.OK

    def _open(self) -> None:
        """Take hold of everything that has a name: segments, the control socket, ring sockets."""
        options = self._options
        _raise_descriptor_limit()
        stale = segments.remove_stale(options.instance)
        self._logging = self._stack.enter_context(SupervisorLogging(options.instance))
        self._log = self._logging.logger(Facility.Supervisor)
        uid, gid = self._owner
        self._control_plane_ring = self._stack.enter_context(
            SharedSPSCRingBuffer.create(
                segment_name(Facility.ControlPlane, instance=options.instance),
                facility=Facility.ControlPlane,
                uid=uid,
                gid=gid,
            )
        )
        self._fleet = Fleet(
            self._cores,
            options.instance,
            self._owner,
            options.interfaces,
            options.ring_mib << 20,
            Fanout[options.fanout],
        )
        self._stack.callback(self._fleet.close)
        self._set_level(Severity[options.log_level.capitalize()], None, None)
        self._drain = Drain(sys.stdout, as_json=options.log_format == "json")
        self._drain.add(self._rings())
        self._drain.start()
        self._stack.callback(self._drain.stop)
        self._log.info("Starting MCR supervisor")
        if stale:
            self._log.notice(f"Removed {len(stale)} segments of a killed supervisor: {', '.join(stale)}")
        self._listener = self._stack.enter_context(self._listen())
        self._monitor = self._stack.enter_context(contextlib.closing(interfaces.InterfaceMonitor()))
        self._selector.register(self._monitor, selectors.EVENT_READ, self._on_interfaces)
        self._wakeup, signalled = socket.socketpair()
        self._stack.enter_context(self._wakeup)
        self._stack.enter_context(signalled)
        for end in (self._wakeup, signalled):
            end.setblocking(False)
        signal.set_wakeup_fd(signalled.fileno())
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        self._selector.register(self._wakeup, selectors.EVENT_READ, self._on_signals)
        self._fleet.begin((), self._interfaces, strict=True)
        self._fleet.finish()
        self._sampler = Sampler(self._fleet)

    def _start(self) -> None:
        self._start_control_plane()
        self._start_template()
        for worker in self._fleet.workers:
            self._log.info(f"Spawning Data Plane worker for core {worker.core}", core=worker.core)
        self._next_tick_s = time.monotonic() + TICK_S
        self._next_report_s = time.monotonic() + self._options.stats_interval_s

    def _turn(self) -> None:
        """Wait for the next event and deal with it."""
        due = [self._next_tick_s, *(at for at, _ in self._timers)]
        if self._change is not None:
            due.append(self._change.deadline_s)
        timeout_s = max(min(due) - time.monotonic(), 0)
        for key, _ in self._selector.select(timeout_s):
            key.data()
        self._watch_children()
        now_s = time.monotonic()
        for timer in [timer for timer in self._timers if timer[0] <= now_s]:
            self._timers.remove(timer)
            timer[1]()
        if now_s >= self._next_tick_s:
            self._tick(now_s)
        self._settle_change()

    def _stop(self) -> None:
        """End the workers when their rings are empty, then the control plane; nobody outlives this."""
        deadline_s = time.monotonic() + STOP_S_MAX
        self._fleet.close_channels()
        pids = {worker.pid for worker in self._fleet.workers if worker.pid}
        while pids and self._template_channel is not None and time.monotonic() < deadline_s:
            pids -= self._await_exits(deadline_s)
        for pid in pids:
            self._log.error("Worker process did not end in time, killed", pid=pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self._template_channel is not None:
            self._template_channel.close()
        if self._stream is not None:
            self._stream.close()
        for child in (self._template, self._control_plane):
            if child is None:
                continue
            try:
                child.wait(max(deadline_s - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        self._report()
        self._log.info("Shutting down...")

    def _await_exits(self, deadline_s: float) -> set[int]:
        """The pids of workers that ended; waits for one at most until the deadline."""
        assert self._template_channel is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._template_channel, selectors.EVENT_READ)
            selector.select(max(deadline_s - time.monotonic(), 0))
        try:
            message, _ = self._template_channel.receive()
        except BlockingIOError:
            return set()
        except ChannelClosedError:
            self._template_channel = None
            return set()
        return {message.pid} if isinstance(message, Exited) else set()

    # --- log --------------------------------------------------------------------------------------

    def _rings(self) -> list[SharedSPSCRingBuffer]:
        rings = [self._logging.rings[Facility.Supervisor], self._control_plane_ring]
        return rings + [ring for worker in self._fleet.workers for ring in worker.logs.rings.values()]

    def _chosen_rings(self, facility: str | None, core: int | None) -> list[SharedSPSCRingBuffer]:
        """Rings by facility and core, both optional. Raises RelayError when there is none such."""
        chosen = [
            ring
            for ring in self._rings()
            if (facility is None or ring.facility.name.lower() == facility.lower())
            and (core is None or (ring.core == core and ring.facility not in UNPINNED))
        ]
        if not chosen:
            names = ", ".join(sorted({ring.facility.name for ring in self._rings()}))
            raise RelayError(f"no log ring of facility {facility} and core {core}: facilities are {names}")
        return chosen

    def _set_level(self, level: Severity, facility: str | None, core: int | None) -> None:
        for ring in self._chosen_rings(facility, core):
            ring.segment.level = level

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

    # --- events -----------------------------------------------------------------------------------

    def _on_signals(self) -> None:
        for number in self._wakeup.recv(4096):
            if number in (signal.SIGINT, signal.SIGTERM):
                self._stopping = True
            elif number == signal.SIGHUP:
                self._reconfigure()

    def _reconfigure(self) -> None:
        """Read the configuration again and let the control plane install its rules."""
        try:
            options, configured = self._reload()
            rules = tuple(configured)
        except RelayError as error:
            self._log.error(f"Configuration not changed: {error}")
            return
        self._log.notice(f"Configuration read again: {len(rules)} rules")
        if options != self._options:
            self._log.warning("Options other than rules have changed: they take effect at the next start")
        self._configured = rules
        self._tell(Configure(rules))

    def _on_interfaces(self) -> None:
        self._monitor.discard()
        former, self._interfaces = self._interfaces, interfaces.snapshot()
        if former == self._interfaces:
            return
        for name in sorted({*former, *self._interfaces}):
            self._log_interface(former.get(name), self._interfaces.get(name))
        self._changes.append(
            Change(
                begin=lambda: self._fleet.begin(tuple(self._rules.values()), self._interfaces, strict=False),
                end=self._log_warnings,
                refuse=lambda error: void(self._log.error(f"Interfaces changed: {error}")),
            )
        )

    def _log_interface(self, former: interfaces.Interface | None, present: interfaces.Interface | None) -> None:
        if present is None:
            assert former is not None
            self._log.notice(f"Interface {former.name} is gone")
        elif former is None or former.index != present.index:
            self._log.notice(f"Interface {present.name} appeared, {'up' if present.is_up else 'down'}")
        elif former.is_up != present.is_up:
            self._log.notice(f"Interface {present.name} is {'up' if present.is_up else 'down'}")

    def _log_warnings(self, warnings: list[str]) -> None:
        for warning in warnings:
            self._log.warning(warning)

    def _tick(self, now_s: float) -> None:
        self._next_tick_s += TICK_S
        if self._next_tick_s < now_s:
            self._next_tick_s = now_s + TICK_S
        for (core, interface), drops in self._fleet.count_ring_drops().items():
            self._log.warning(
                f"Ring of {interface} full: {drops} datagrams lost on core {core}", core=core, iface=interface
            )
        self._sampler.tick()
        if self._options.stats_interval_s and now_s >= self._next_report_s:
            self._next_report_s = now_s + self._options.stats_interval_s
            self._report()

    # --- changes of rules and interfaces ----------------------------------------------------------

    def _settle_change(self) -> None:
        """End the change under way if every worker has gone over, and begin the next."""
        if self._change is not None:
            late = time.monotonic() >= self._change.deadline_s
            if not self._fleet.is_confirmed() and not late:
                return
            if late:
                cores = [w.core for w in self._fleet.workers if w.generation != self._fleet.generation]
                self._change.warnings.append(f"workers on cores {cores} have not taken the change yet")
            self._fleet.finish()
            ended, self._change = self._change, None
            ended.end(ended.warnings)
        while self._changes and self._change is None:
            change = self._changes.popleft()
            try:
                change.warnings = change.begin()
            except RelayError as error:
                change.refuse(str(error))
                continue
            change.deadline_s = time.monotonic() + CONFIRM_S_MAX
            self._change = change
            self._settle_change()

    def _apply(self, request: ApplyRules) -> None:
        """Queue a change of rules that the control plane asks for."""
        former: dict[str, Rule] = {}

        def begin() -> list[str]:
            former.update(self._rules)
            wanted = {k: rule for k, rule in self._rules.items() if k not in request.remove}
            for rule in request.add:
                wanted[rule.rule_id] = validate(rule)
            check_cycles(request.add, wanted, self._options.interfaces)
            warnings = self._fleet.begin(tuple(wanted.values()), self._interfaces, strict=True)
            self._rules = wanted
            return [w for w in warnings if not w.startswith("rule ")] + self._waiting(request.add)

        def end(warnings: list[str]) -> None:
            if request.configured is not None:
                self._configured_ids = request.configured
            self._log_rules(former)
            self._log_warnings(warnings)
            self._tell(Done(request.request_id, tuple(warnings)))

        self._changes.append(Change(begin, end, lambda error: self._tell(Refused(request.request_id, error))))

    def _waiting(self, rules: Sequence[Rule]) -> list[str]:
        """Warnings for those of `rules` that can't work yet."""
        ids = {rule.rule_id for rule in rules}
        return [
            f"rule {planned.rule.rule_id} is {planned.state}"
            for planned in self._fleet.plan.rules
            if planned.rule.rule_id in ids and planned.state != "active"
        ]

    def _log_rules(self, former: dict[str, Rule]) -> None:
        for rule_id, rule in former.items():
            if rule_id not in self._rules:
                self._log.notice(f"Rule {rule_id} removed", rule=rule_id)
            elif self._rules[rule_id] != rule:
                self._log.notice(f"Rule {rule_id} replaced: {describe(self._rules[rule_id])}", rule=rule_id)
        for rule_id, rule in self._rules.items():
            if rule_id not in former:
                self._log.notice(f"Rule {rule_id} added: {describe(rule)}", rule=rule_id)

    # --- control plane ----------------------------------------------------------------------------

    def _listen(self) -> socket.socket:
        """The client socket, bound where clients look for it. Raises PreflightError."""
        path = config.socket_path(self._options.socket, self._options.instance)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_socket() and not _answers(path):
                path.unlink()
                self._log.notice(f"Removed the control socket {path} of a killed supervisor")
            listener.bind(str(path))
            path.chmod(SOCKET_MODE)
            listener.listen(128)
        except OSError as error:
            listener.close()
            raise PreflightError(
                f"control socket {path}: {error.strerror}: stop the relay that uses it, or give --socket"
            ) from error
        self._stack.callback(path.unlink, missing_ok=True)
        return listener

    def _start_control_plane(self) -> None:
        self._log.info("Spawning Control Plane worker")
        self._control_plane_started_s = time.monotonic()
        self._control_plane_ready = False
        self._control_plane, end = start_control_plane(self._listener, *self._owner, self._options.instance)
        self._stream = ControlPlaneStream(end)
        self._selector.register(self._stream, selectors.EVENT_READ, self._on_stream)
        self._tell(Restore(tuple(self._rules.values()), self._configured_ids, self._options.interfaces))
        self._tell(Configure(self._configured))

    def _tell(self, message: msgspec.Struct) -> None:
        """Send; a stream that is broken is dealt with when its process has ended."""
        if self._stream is None:
            return
        with contextlib.suppress(StreamBrokenError):
            self._stream.send(message)
        self._poll_stream()

    def _poll_stream(self) -> None:
        if self._stream is not None:
            write = selectors.EVENT_WRITE if self._stream.wants_to_write else 0
            self._selector.modify(self._stream, selectors.EVENT_READ | write, self._on_stream)

    def _on_stream(self) -> None:
        if self._stream is None:
            return
        try:
            self._stream.flush()
            messages = self._stream.receive()
        except StreamBrokenError:
            self._drop_stream()
            return
        self._poll_stream()
        for message in messages:
            self._obey(message)

    def _drop_stream(self) -> None:
        """Let go of a broken stream, and of the process behind it."""
        if self._stream is not None:
            self._selector.unregister(self._stream)
            self._stream.close()
            self._stream = None
        if self._control_plane is not None:
            self._control_plane.kill()

    def _obey(self, request: object) -> None:
        """Carry out a request of the control plane."""
        match request:
            case Ready():
                self._control_plane_ready = True
                self._spawn_all()
            case ApplyRules():
                self._apply(request)
            case GetStats():
                self._tell(self._sampler.stats(request.request_id))
            case ListWorkers():
                self._tell(Workers(request.request_id, self._sampler.workers()))
            case LogLevel():
                self._on_log_level(request)

    def _on_log_level(self, request: LogLevel) -> None:
        try:
            rings = self._chosen_rings(request.facility, request.core)
            if request.level is not None:
                if request.level not in config.LOG_LEVELS:
                    raise RelayError(f"level {request.level!r}: allowed are {', '.join(config.LOG_LEVELS)}")
                self._set_level(Severity[request.level.capitalize()], request.facility, request.core)
                self._log.notice(f"Log level set to {request.level} for {len(rings)} rings")
        except RelayError as error:
            self._tell(Refused(request.request_id, str(error)))
            return
        levels = {ring.segment.name: ring.segment.level.name.lower() for ring in rings}
        self._tell(Levels(request.request_id, levels))

    # --- template and workers ---------------------------------------------------------------------

    def _start_template(self) -> None:
        self._template_started_s = time.monotonic()
        self._template_ready = False
        self._template, self._template_channel = start_template(*self._owner)
        self._selector.register(self._template_channel, selectors.EVENT_READ, self._on_template)

    def _on_template(self) -> None:
        try:
            while self._template_channel is not None:
                message, _ = self._template_channel.receive()
                match message:
                    case TemplateReady():
                        self._template_ready = True
                        self._spawn_all()
                    case Spawned():
                        self._worker_of(message.core).pid = message.pid
                    case Exited():
                        self._on_worker_exit(message)
        except BlockingIOError:
            return
        except ChannelClosedError:
            if self._template_channel is not None:
                self._selector.unregister(self._template_channel)
                self._template_channel.close()
                self._template_channel = None

    def _worker_of(self, core: int) -> Worker:
        return next(worker for worker in self._fleet.workers if worker.core == core)

    def _spawn_all(self) -> None:
        """Spawn every worker that has no process, once the template and the control plane are ready."""
        if self._template_ready and self._control_plane_ready:
            for worker in self._fleet.workers:
                if worker.channel is None:
                    self._spawn(worker)

    def _spawn(self, worker: Worker) -> None:
        if self._template_channel is None or not self._template_ready or worker.channel is not None:
            return
        channel: Channel[FromWorker]
        channel, far = channel_pair(FromWorker)
        with far:
            try:
                self._template_channel.send(
                    Spawn(worker.core, self._options.instance, self._options.idle), [far.fileno()]
                )
            except ChannelClosedError:
                channel.close()
                return
        worker.channel = channel
        worker.started_s = time.monotonic()
        self._selector.register(channel, selectors.EVENT_READ, lambda: self._on_worker(worker, channel))

    def _on_worker(self, worker: Worker, channel: Channel[FromWorker]) -> None:
        try:
            while True:
                message, _ = channel.receive()
                match message:
                    case Started():
                        self._fleet.worker_started(worker)
                    case TableInUse():
                        worker.generation = message.generation
        except BlockingIOError:
            return
        except ChannelClosedError:
            self._selector.unregister(channel)
            worker.running = False
            if self._template_channel is None:  # nobody will tell of its exit
                self._on_worker_exit(Exited(worker.core, worker.pid, 0))

    def _on_worker_exit(self, exited: Exited) -> None:
        """Report a worker that ended although nobody told it to, and start the next."""
        worker = self._worker_of(exited.core)
        if worker.channel is not None:
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(worker.channel)
        lived_s = time.monotonic() - worker.started_s
        self._fleet.worker_gone(worker)
        self._log.error(
            f"Worker process exited unexpectedly: core {exited.core}, pid {exited.pid}, {describe_exit(exited.status)}"
        )
        self._after(0 if lived_s > RESTART_DELAY_S else RESTART_DELAY_S, lambda: self._respawn(worker))

    def _respawn(self, worker: Worker) -> None:
        self._log.info(f"Spawning Data Plane worker for core {worker.core}", core=worker.core)
        self._spawn(worker)

    def _after(self, delay_s: float, action: Callable[[], None]) -> None:
        self._timers.append((time.monotonic() + delay_s, action))

    def _watch_children(self) -> None:
        """Start the control plane or the template again when it ended; give up when it never came up."""
        if self._control_plane is not None and self._control_plane.poll() is not None:
            status = self._control_plane.returncode
            self._control_plane = None
            self._drop_stream()
            self._child_ended("Control plane", status, self._control_plane_ready, self._start_control_plane)
        if self._template is not None and self._template.poll() is not None:
            status = self._template.returncode
            self._template = None
            self._on_template()
            self._child_ended("Template", status, self._template_ready, self._start_template)

    def _child_ended(self, name: str, status: int, was_ready: bool, restart: Callable[[], None]) -> None:
        if self._stopping:
            return
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        self._log.error(f"{name} process exited unexpectedly: {how}")
        if was_ready:
            self._after(0, restart)
        else:
            self._failed = self._stopping = True


UNPINNED = (Facility.Supervisor, Facility.ControlPlane)


def void(_: object) -> None:
    """For callbacks whose result nobody wants."""


def describe(rule: Rule) -> str:
    """A rule in a line."""
    source = f"{rule.source} " if rule.source else ""
    outputs = ", ".join(output_name(output) for output in rule.outputs)
    return f"{source}{rule.input_group}:{rule.input_port} -> {outputs}"


def describe_exit(status: int) -> str:
    """How a process ended, from the status of waitpid."""
    if os.WIFSIGNALED(status):
        return f"signal {signal.Signals(os.WTERMSIG(status)).name}"
    return f"exit status {os.WEXITSTATUS(status)}"


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
    return True


def _raise_descriptor_limit() -> None:
    """Sockets of thousands of outputs: the hard limit, or more where the process may raise it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (DESCRIPTORS_WANTED, hard):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, max(limit, hard)))
            return
