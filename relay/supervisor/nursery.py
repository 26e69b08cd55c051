"""The nursery: the template process and the workers forked from it - starting, watching, replacing, ending them.

Owned by the supervisor's thread. A worker that ends unexpectedly is logged and replaced; its rings go on filling. One
that hangs is killed, and so replaced. One that keeps dying is started ever more seldom, and others get its traffic.
"""

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable

from logging_shm import Logger
from relay.descriptors import Channel, ChannelClosedError, channel_pair
from relay.errors import RelayError
from relay.messages import Exited, FromTemplate, FromWorker, Leave, Spawn, Spawned, Started, TableInUse, TemplateReady
from relay.supervisor.children import describe_status, start_template
from relay.supervisor.fleet import Fleet, Worker
from relay.supervisor.health import PROBATION_S, PULSE_INTERVAL_S
from relay.supervisor.keeper import Keeper
from relay.supervisor.logs import last_words
from relay.supervisor.timers import Timers

START_S_MAX = 10.0  # until a forked worker says that it runs


class Nursery:
    """All workers' processes."""

    def __init__(
        self,
        fleet: Fleet,
        log: Logger,
        selector: selectors.BaseSelector,
        timers: Timers,
        owner: tuple[int, int],
        instance: str | None,
        idle: str,
        keeper: Keeper,
        on_started: Callable[[Worker], None],
    ) -> None:
        self._fleet = fleet
        self._log = log
        self._selector = selector
        self._timers = timers
        self._owner = owner
        self._instance = instance
        self._idle = idle
        self._keeper = keeper
        self._on_started = on_started
        self._template: subprocess.Popen[bytes] | None = None
        self._channel: Channel[FromTemplate] | None = None
        self._template_ready = False
        self._open = False

    def start(self) -> None:
        """Start the template; workers follow when it is ready and `open` was called."""
        self._template_ready = False
        self._template, self._channel = start_template(*self._owner, self._keeper.listener)
        self._keeper.attach(self._channel)
        self._selector.register(self._channel, selectors.EVENT_READ, self._on_template)

    def open(self) -> None:
        """Let workers be spawned from now on."""
        if not self._open:
            self._timers.after(PULSE_INTERVAL_S, self._take_pulses)
        self._open = True
        self._spawn_all()

    def watch(self, give_up: Callable[[], None]) -> None:
        """Start the template again when it ended; give up when it never came up."""
        if self._template is None or self._template.poll() is None:
            return
        status = self._template.returncode
        self._template = None
        self._on_template()
        self._log.error(f"Template process exited unexpectedly: {describe_status(status)}")
        if self._template_ready:
            self._timers.after(0, self.start)
        else:
            give_up()

    def stop(self, deadline_s: float) -> None:
        """End the workers when their rings are empty, then the template; none outlives the deadline by much."""
        self._fleet.close_channels()
        pids = {worker.pid for worker in self._fleet.workers if worker.pid}
        while pids and self._channel is not None and time.monotonic() < deadline_s:
            pids -= self._await_exits(self._channel, deadline_s)
        for pid in pids:
            self._log.error("Worker process did not end in time, killed", pid=pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self._channel is not None:
            with contextlib.suppress(ChannelClosedError):
                self._channel.send(Leave())
            self._channel.close()
        if self._template is not None:
            self._template.wait()

    @property
    def template_pid(self) -> int:
        """The template's process, 0 without one."""
        return self._template.pid if self._template is not None else 0

    def _await_exits(self, channel: Channel[FromTemplate], deadline_s: float) -> set[int]:
        """The pids of workers that ended; waits for one at most until the deadline."""
        with selectors.DefaultSelector() as selector:
            selector.register(channel, selectors.EVENT_READ)
            selector.select(max(deadline_s - time.monotonic(), 0))
        try:
            message, _ = channel.receive()
        except BlockingIOError:
            return set()
        except ChannelClosedError:
            self._channel = None
            return set()
        return {message.pid} if isinstance(message, Exited) else set()

    def _on_template(self) -> None:
        try:
            while self._channel is not None:
                message, _ = self._channel.receive()
                match message:
                    case TemplateReady():
                        self._template_ready = True
                        self._spawn_all()
                    case Spawned():
                        self._fleet.worker_spawned(self._worker_of(message.core), message.pid)
                    case Exited():
                        self._on_exit(message)
        except BlockingIOError:
            return
        except ChannelClosedError:
            if self._channel is not None:
                self._selector.unregister(self._channel)
                self._channel.close()
                self._channel = None
                self._keeper.attach(None)

    def _worker_of(self, core: int) -> Worker:
        return next(worker for worker in self._fleet.workers if worker.core == core)

    def _spawn_all(self) -> None:
        for worker in self._fleet.workers:
            self._spawn(worker)

    def _spawn(self, worker: Worker) -> None:
        """Spawn a worker that has no process, if it can be done now; TemplateReady does it later otherwise."""
        if not self._open or not self._template_ready or self._channel is None or worker.channel is not None:
            return
        channel: Channel[FromWorker]
        channel, far = channel_pair(FromWorker)
        with far:
            try:
                self._channel.send(Spawn(worker.core, self._instance, self._idle), [far.fileno()])
            except ChannelClosedError:
                channel.close()
                return
        worker.channel = channel
        worker.started_s = time.monotonic()
        worker.pulse.begin(worker.started_s)
        self._selector.register(channel, selectors.EVENT_READ, lambda: self._on_worker(worker, channel))

    def _on_worker(self, worker: Worker, channel: Channel[FromWorker]) -> None:
        try:
            while True:
                message, _ = channel.receive()
                match message:
                    case Started():
                        self._fleet.worker_started(worker)
                        self._on_started(worker)
                    case TableInUse():
                        worker.generation = message.generation
        except BlockingIOError:
            return
        except ChannelClosedError:
            self._selector.unregister(channel)
            worker.running = False
            if self._channel is None:  # nobody will tell of its exit
                self._on_exit(Exited(worker.core, worker.pid, 0))

    def _on_exit(self, exited: Exited) -> None:
        """Report a worker that ended although nobody told it to, and start the next."""
        worker = self._worker_of(exited.core)
        if worker.channel is not None:
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(worker.channel)
        lived_s = time.monotonic() - worker.started_s
        self._fleet.worker_gone(worker)
        how = describe_status(os.waitstatus_to_exitcode(exited.status))
        words = last_words(worker.logs.rings.values())
        last = f"it last logged: {words}" if words else "it had logged nothing"
        self._log.critical(
            f"Worker process exited unexpectedly: core {exited.core}, pid {exited.pid}, {how}; {last}", core=exited.core
        )
        delay_s = worker.lives.died(lived_s)
        # While a former supervisor's worker relays, nothing is lost by waiting for one that lives.
        if worker.lives.is_hopeless and not worker.is_excluded and worker.predecessor is None:
            self._exclude(worker)
        self._timers.after(delay_s, lambda: self._respawn(worker))

    def _exclude(self, worker: Worker) -> None:
        """Say that a worker keeps dying, and give its share of the traffic to others."""
        lost = self._fleet.exclude(worker)
        whose = f"The worker of core {worker.core} has died {worker.lives.young_deaths} times at once"
        if lost is None:
            self._log.alert(f"{whose}: there is no other, its traffic is lost when its ring is full", core=worker.core)
        else:
            self._log.alert(f"{whose}: others get its traffic, {lost} frames in its rings are lost", core=worker.core)

    def _take_pulses(self) -> None:
        """Kill workers that hang, and take back those that have recovered."""
        self._timers.after(PULSE_INTERVAL_S, self._take_pulses)
        now_s = time.monotonic()
        for worker in self._fleet.workers:
            if not worker.pid:
                continue
            alive_s = now_s - worker.started_s
            if worker.running and worker.is_excluded and alive_s >= PROBATION_S:
                self._readmit(worker)
            hangs = worker.pulse.hangs(worker.sign_of_life(), now_s) if worker.running else alive_s > START_S_MAX
            if hangs:
                self._log.error(f"The worker of core {worker.core} hangs, killed", core=worker.core, pid=worker.pid)
                try:
                    os.kill(worker.pid, signal.SIGKILL)
                except ProcessLookupError:  # its template had died, and nobody told of its end
                    self._on_exit(Exited(worker.core, worker.pid, signal.SIGKILL))

    def _readmit(self, worker: Worker) -> None:
        worker.started_s = time.monotonic()
        try:
            self._fleet.readmit(worker)
        except RelayError as error:
            self._log.error(str(error), core=worker.core)
            return
        self._log.notice(f"The worker of core {worker.core} has recovered and gets its traffic again", core=worker.core)

    def _respawn(self, worker: Worker) -> None:
        self._log.info(f"Spawning Data Plane worker for core {worker.core}", core=worker.core)
        self._spawn(worker)
