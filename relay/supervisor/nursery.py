"""The nursery: the template process and the workers forked from it - starting, watching, replacing, ending them.

Owned by the supervisor's thread. A worker that ends unexpectedly is logged and replaced; its rings go on filling. One
that hangs is killed, and so replaced. One that keeps dying is started ever more seldom; who gets its traffic then is
decided elsewhere (relief.py). A template that does not answer is replaced, as nobody else can start workers.
Template and workers are less privileged, and so not believed: who sends what it must not is killed and replaced, and a
pid that the template names is looked at (kin.py) before it is signalled.
"""

import contextlib
import os
import selectors
import subprocess
import time
from collections.abc import Callable
from functools import partial

import msgspec

from logging_shm import Logger
from relay.descriptors import Channel, ChannelClosedError, channel_pair
from relay.messages import Exited, FromTemplate, FromWorker, Leave, Spawn, Spawned, Started, TableInUse, TemplateReady
from relay.supervisor import kin
from relay.supervisor.children import MisbehaviourError, describe_status, start_template
from relay.supervisor.fleet import Fleet
from relay.supervisor.health import HANG_S, PROBATION_S, PULSE_INTERVAL_S, START_HANG_S, Pulse
from relay.supervisor.keeper import Keeper
from relay.supervisor.logs import last_words
from relay.supervisor.relief import Relief
from relay.supervisor.timers import Timers
from relay.supervisor.vitals import read_vitals
from relay.supervisor.worker import Worker

RESTART_DELAY_S = 0.5  # for a template that ended before it was ready, more than once
STARTS_MAX = 5  # of templates that somebody kills before the first one is ready
MESSAGES_A_TURN = 64  # from one process, before everything else has its turn
TEMPLATE_HANG_S = 2.0  # it forks in milliseconds, and tells of an exit at once
END_S_MAX = 0.5  # for a process that has closed its channel
UNTOLD = "how is not known, its template has ended"


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
        manner: tuple[str, str],
        keeper: Keeper,
        on_started: Callable[[Worker], None],
    ) -> None:
        self._fleet = fleet
        self._relief = Relief(fleet, log)
        self._log = log
        self._selector = selector
        self._timers = timers
        self._owner = owner
        self._uid = owner[0] if os.geteuid() == 0 else os.getuid()  # privileges.drop_to
        self._instance = instance
        self._manner = manner  # of waiting, and of looking into streams: as Spawn has them
        self._keeper = keeper
        self._on_started = on_started
        self._template: subprocess.Popen[bytes] | None = None
        self._channel: Channel[FromTemplate] | None = None
        self._template_ready = False
        self._template_was_ever_ready = False
        self._template_pulse = Pulse()
        self._heard = 0  # messages of templates
        self._failed_starts = 0  # of templates, one after the other
        self._open = False
        self._pidfds: dict[int, int] = {}  # by core: of workers that are what their template said
        self._templates: dict[int, int] = {}  # by core: the template's pid that was asked for the worker
        self._condemned: set[int] = set()  # cores whose worker is killed as soon as its pid is known
        self._silent: set[int] = set()  # cores whose worker has closed its channel, and whose exit was not told yet
        self._early: set[int] = set()  # cores whose worker says that it runs, and whose pid was not told yet

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

    @property
    def is_open(self) -> bool:
        """Whether workers may be spawned."""
        return self._open

    def watch(self, give_up: Callable[[], None]) -> None:
        """Start the template again when it ended; give up when none ever came up."""
        if self._template is None or self._template.poll() is None:
            return
        status = self._template.returncode
        self._on_template()
        self._close_channel()
        self._template = None
        self._log.error(f"Template process exited unexpectedly: {describe_status(status)}")
        for worker in self._fleet.workers:  # nobody will tell of these any more
            if worker.channel is not None and not worker.pid:
                self._call_off(worker)
            elif worker.core in self._silent:
                self._on_exit(worker, UNTOLD)
        self._failed_starts = 0 if self._template_ready else self._failed_starts + 1
        is_killed = status < 0 and self._failed_starts < STARTS_MAX
        if self._template_was_ever_ready or is_killed:
            # At once, if it can be: until then nobody keeps anything for the next supervisor.
            self._timers.after(0 if self._failed_starts <= 1 else RESTART_DELAY_S, self.start)
        else:
            give_up()

    def stop(self, deadline_s: float) -> None:
        """End the workers when their rings are empty, then the template; none outlives the deadline by much."""
        self._fleet.close_channels()
        left = dict(self._pidfds)
        while left and time.monotonic() < deadline_s:
            self._await_exit(left, deadline_s)
        for core in [core for core, pidfd in left.items() if not kin.has_ended(pidfd)]:
            worker = self._worker_of(core)
            self._log.error("Worker process did not end in time, killed", pid=worker.pid)
            self._kill(worker)
        if self._channel is not None:
            with contextlib.suppress(ChannelClosedError):
                self._channel.send(Leave())
            self._channel.close()
        if self._template is not None:
            try:
                self._template.wait(END_S_MAX)
            except subprocess.TimeoutExpired:
                self._template.kill()
                self._template.wait()
        for pidfd in self._pidfds.values():
            os.close(pidfd)

    @property
    def is_settled(self) -> bool:
        """Whether the template and all workers run that have no reason to wait."""
        ready = self._template is not None and self._channel is not None and self._template_ready
        return ready and all(worker.running or worker.lives.young_deaths > 1 for worker in self._fleet.workers)

    @property
    def template_pid(self) -> int:
        """The template's process, 0 without one."""
        return self._template.pid if self._template is not None else 0

    def _await_exit(self, pidfds: dict[int, int], deadline_s: float) -> None:
        """Take out those of ended processes that their template has waited for; waits for an event at most."""
        if self._fleet.flush():
            deadline_s = min(deadline_s, time.monotonic() + PULSE_INTERVAL_S)
        with selectors.DefaultSelector() as selector:
            for pidfd in pidfds.values():
                if not kin.has_ended(pidfd):
                    selector.register(pidfd, selectors.EVENT_READ)
            if self._channel is not None:
                selector.register(self._channel, selectors.EVENT_READ)
            selector.select(max(deadline_s - time.monotonic(), 0))
        self._discard_messages()
        for core, pidfd in list(pidfds.items()):
            if kin.was_waited_for(pidfd) or (self._is_orphan(core) and kin.has_ended(pidfd)):
                del pidfds[core]

    def _discard_messages(self) -> None:
        try:
            for _ in range(MESSAGES_A_TURN):
                if self._channel is not None:
                    self._channel.receive()
        except BlockingIOError:
            return
        except (ChannelClosedError, msgspec.MsgspecError):
            self._close_channel()

    def _is_orphan(self, core: int) -> bool:
        """Whether the template that was asked for the worker is gone, so that nobody tells of its exit."""
        return self._channel is None or self._template is None or self._templates.get(core) != self._template.pid

    def _on_template(self) -> None:
        try:
            for _ in range(MESSAGES_A_TURN):
                if self._channel is None:
                    return
                message, _ = self._channel.receive()
                self._hear_template(message)
        except BlockingIOError:
            return
        except ChannelClosedError:
            self._close_channel()
            if self._template is not None:
                self._timers.after(END_S_MAX, self._template.kill)  # `watch` waits for its end
        except (msgspec.MsgspecError, MisbehaviourError) as error:
            self._log.error(f"Template sent what it must not, killed: {error}")
            self._close_channel()
            if self._template is not None:
                self._template.kill()

    def _hear_template(self, message: FromTemplate) -> None:
        """Raises MisbehaviourError for what does not fit the state."""
        self._heard += 1
        match message:
            case TemplateReady():
                if self._template_ready:
                    raise MisbehaviourError("out of order: TemplateReady")
                self._template_ready = self._template_was_ever_ready = True
                self._spawn_all()
            case Spawned():
                self._on_spawned(self._worker_of(message.core), message.pid)
            case Exited():
                worker = self._worker_of(message.core)
                if not worker.pid and self._template is not None and self._template.poll() is not None:
                    return  # not known when it was spawned, either
                if worker.pid != message.pid or (worker.core in self._pidfds and not self._has_ended(worker)):
                    raise MisbehaviourError(f"an exit that did not happen: {message}")
                self._on_exit(worker, describe_status(os.waitstatus_to_exitcode(message.status)))

    def _on_spawned(self, worker: Worker, pid: int) -> None:
        """Raises MisbehaviourError unless the template was asked for this worker, and the pid is a child of it."""
        template_pid = self._templates.get(worker.core)
        if worker.channel is None or worker.pid or self._template is None or template_pid != self._template.pid:
            raise MisbehaviourError(f"a worker that was not asked for: core {worker.core}, pid {pid}")
        if self._template.poll() is not None:
            return  # init is its parent by now, and nothing can be known: `watch` calls it off
        try:
            pidfd = kin.hold(pid, template_pid, self._uid)
        except kin.NotKinError as error:
            raise MisbehaviourError(str(error)) from error
        if pidfd is not None:
            self._pidfds[worker.core] = pidfd
        self._fleet.worker_spawned(worker, pid)
        if worker.core in self._condemned:
            self._kill(worker)
        elif worker.core in self._early:
            self._begin(worker)

    def _has_ended(self, worker: Worker) -> bool:
        return worker.core not in self._pidfds or kin.has_ended(self._pidfds[worker.core])

    def _kill(self, worker: Worker) -> None:
        """End a worker's process; one whose pid is not known yet, as soon as it is."""
        if worker.core in self._pidfds:
            kin.kill(self._pidfds[worker.core])
        else:
            self._condemned.add(worker.core)

    def _close_channel(self) -> None:
        if self._channel is not None:
            self._selector.unregister(self._channel)
            self._channel.close()
            self._channel = None
            self._keeper.attach(None)

    def _worker_of(self, core: int) -> Worker:
        """Raises MisbehaviourError for a core that has no worker."""
        for worker in self._fleet.workers:
            if worker.core == core:
                return worker
        raise MisbehaviourError(f"core {core}, which has no worker")

    def _spawn_all(self) -> None:
        for worker in self._fleet.workers:
            self._spawn(worker)

    def _spawn(self, worker: Worker) -> None:
        """Spawn a worker that has no process, if it can be done now; TemplateReady does it later otherwise."""
        if not self._open or not self._template_ready or self._channel is None or worker.channel is not None:
            return
        assert self._template is not None
        channel: Channel[FromWorker]
        channel, far = channel_pair(FromWorker)
        with far:
            try:
                self._channel.send(
                    Spawn(worker.core, self._instance, *self._manner), [far.fileno(), worker.copies.fileno()]
                )
            except ChannelClosedError:
                channel.close()
                return
            except BlockingIOError:  # the template is busy
                channel.close()
                self._timers.after(RESTART_DELAY_S, lambda: self._spawn(worker))
                return
        worker.channel = channel
        worker.generation = -1
        self._templates[worker.core] = self._template.pid
        worker.started_s = time.monotonic()
        worker.pulse.begin(worker.started_s)
        self._selector.register(channel, selectors.EVENT_READ, lambda: self._on_worker(worker, channel))

    def _on_worker(self, worker: Worker, channel: Channel[FromWorker]) -> None:
        if worker.channel is not channel:  # its exit was told by an event that the same select returned
            return
        try:
            for _ in range(MESSAGES_A_TURN):
                message, _ = channel.receive()
                self._hear_worker(worker, message)
        except BlockingIOError:
            worker.flush()  # it reads, so there may be room
        except ChannelClosedError:
            self._let_go(worker, channel)
        except (msgspec.MsgspecError, MisbehaviourError) as error:
            self._log.error(f"Worker on core {worker.core} sent what it must not, killed: {error}", core=worker.core)
            self._kill(worker)
            self._let_go(worker, channel)

    def _hear_worker(self, worker: Worker, message: FromWorker) -> None:
        """Raises MisbehaviourError for what does not fit the state."""
        match message:
            case Started():
                if worker.running or worker.core in self._early:
                    raise MisbehaviourError("out of order: Started")
                if worker.pid:
                    self._begin(worker)
                else:  # who can't be signalled gets no rings
                    self._early.add(worker.core)
            case TableInUse():
                if not worker.running or not worker.generation < message.generation <= self._fleet.generation:
                    raise MisbehaviourError(f"out of order: {message}")
                worker.generation = message.generation

    def _begin(self, worker: Worker) -> None:
        """A worker runs that can be signalled: hand it everything."""
        self._early.discard(worker.core)
        self._fleet.worker_started(worker)
        self._on_started(worker)

    def _let_go(self, worker: Worker, channel: Channel[FromWorker]) -> None:
        """Hear no more of a worker; its template tells of its exit, if that one is still there."""
        self._selector.unregister(channel)
        worker.running = False
        self._early.discard(worker.core)
        if not self._is_orphan(worker.core):
            self._silent.add(worker.core)
            self._timers.after(END_S_MAX, lambda: self._kill(worker) if worker.channel is channel else None)
        elif worker.pid:
            self._kill(worker)
            self._on_exit(worker, UNTOLD)
        else:
            self._call_off(worker)

    def _call_off(self, worker: Worker) -> None:
        """The template has ended that was asked for this worker, and never told of it: the next one is asked.

        A worker that was forked ends as its channel closes: it was handed no ring, and not told to outlive.
        """
        assert worker.channel is not None
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(worker.channel)
        for cores in (self._condemned, self._silent, self._early):
            cores.discard(worker.core)
        self._fleet.worker_gone(worker)
        self._spawn(worker)

    def _replace_template(self) -> None:
        """Nobody else can start workers: one that does not answer is ended, and `watch` starts the next."""
        if self._template is not None and self._template.poll() is None:
            self._log.error(f"The template does not answer, killed: pid {self._template.pid}")
            self._template.kill()

    def _on_exit(self, worker: Worker, how: str) -> None:
        """Report a worker that ended although nobody told it to, and start the next."""
        pid = worker.pid
        if worker.channel is not None:
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(worker.channel)
        delay_s = worker.lives.died(time.monotonic() - worker.started_s, worker.hangs)
        for cores in (self._condemned, self._silent, self._early):
            cores.discard(worker.core)
        pidfd = self._pidfds.pop(worker.core, None)
        if pidfd is not None:
            os.close(pidfd)
        self._fleet.worker_gone(worker)
        worker.restarts += 1
        words = last_words(worker.logs.rings.values())
        last = f"it last logged: {words}" if words else "it had logged nothing"
        self._log.critical(
            f"Worker process exited unexpectedly: core {worker.core}, pid {pid}, {how}; {last}", core=worker.core
        )
        # While a former supervisor's worker relays, nothing is lost by waiting for one that lives.
        if worker.lives.is_hopeless and not worker.is_excluded and worker.predecessor is None:
            self._relief.exclude(worker)
        self._timers.after(delay_s, lambda: self._respawn(worker))

    def _take_pulses(self) -> None:
        """Kill workers that hang, and say of those that kept dying that they have recovered."""
        self._timers.after(PULSE_INTERVAL_S, self._take_pulses)
        now_s = time.monotonic()
        self._take_pulse_of_template(now_s)
        for worker in self._fleet.workers:
            if not worker.pid or worker.hangs:
                continue
            if worker.running and now_s - worker.started_s >= PROBATION_S:
                self._relief.absolve(worker)
            if worker.channel is not None:
                worker.flush()
            if worker.is_out_of_step:
                self._log.error(f"The worker of core {worker.core} does not read, killed", core=worker.core)
                self._kill(worker)
                continue
            limit_s = HANG_S if worker.running else START_HANG_S
            if worker.pulse.hangs(worker.sign_of_life(), now_s, partial(read_vitals, worker.pid), limit_s):
                worker.hangs = True
                self._log.error(f"The worker of core {worker.core} hangs, killed", core=worker.core, pid=worker.pid)
                self._kill(worker)

    def _take_pulse_of_template(self, now_s: float) -> None:
        """Replace one that has nothing to say of a worker that it was asked for, or of one that has ended.

        Only time counts that it could have used: on a busy machine the next one would be no faster.
        """
        is_awaited = any(
            worker.channel is not None and (not worker.pid or (worker.core in self._silent and self._has_ended(worker)))
            for worker in self._fleet.workers
        )
        if self._template is None or not self._template_ready or not is_awaited:
            self._template_pulse.begin(now_s)
        elif self._template_pulse.hangs(self._heard, now_s, partial(read_vitals, self._template.pid), TEMPLATE_HANG_S):
            self._replace_template()

    def _respawn(self, worker: Worker) -> None:
        self._log.info(f"Spawning Data Plane worker for core {worker.core}", core=worker.core)
        self._spawn(worker)
