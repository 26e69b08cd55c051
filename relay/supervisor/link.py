"""The link to the control plane: its process, the stream to it, and another process when it ends.

Owned by the supervisor's thread. The rules outlive the process: a new one is told them first.
"""

import selectors
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable

import msgspec

from logging_shm import Logger
from relay.messages import Ready
from relay.supervisor.children import MisbehaviourError, describe_status, start_control_plane
from relay.supervisor.stream import ControlPlaneStream, StreamBrokenError
from relay.supervisor.timers import Timers

END_S_MAX = 1.0  # after its stream has closed
TURN_S_MAX = 0.02  # of obeying, before everything else has its turn; one request may take longer
RESTART_DELAY_S = 0.2  # for a process that ended within this time of its start
STARTS_MAX = 5  # of processes that somebody kills before the first one is ready


class ControlPlaneLink:
    """The control plane as the supervisor sees it. `greeting` makes what a new process is told first."""

    def __init__(
        self,
        log: Logger,
        selector: selectors.BaseSelector,
        timers: Timers,
        listener: socket.socket,
        owner: tuple[int, int],
        instance: str | None,
        greeting: Callable[[], Iterable[msgspec.Struct]],
        obey: Callable[[object], None],
        trusted_gid: int | None = None,
    ) -> None:
        self._log = log
        self._selector = selector
        self._timers = timers
        self._listener = listener
        self._owner = owner
        self._instance = instance
        self._greeting = greeting
        self._obey = obey
        self._trusted_gid = trusted_gid
        self._process: subprocess.Popen[bytes] | None = None
        self._stream: ControlPlaneStream | None = None
        self._received: deque[object] = deque()  # and not obeyed yet
        self._is_continuing = False
        self._is_ready = False
        self._was_ever_ready = False
        self._started_s = 0.0
        self.epoch = 0  # counts the processes: what one asked is not answered to the next

    def start(self) -> None:
        """Start the process and tell it the greeting."""
        self._log.info("Spawning Control Plane worker")
        self._is_ready = False
        self._received.clear()
        self._started_s = time.monotonic()
        self.epoch += 1
        self._process, end = start_control_plane(self._listener, *self._owner, self._instance, self._trusted_gid)
        self._stream = ControlPlaneStream(end)
        self._selector.register(self._stream, selectors.EVENT_READ, self._on_stream)
        for message in self._greeting():
            self.tell(message)

    def tell(self, message: msgspec.Struct) -> None:
        """Send; a stream that is broken is dealt with when its process has ended."""
        if self._stream is None:
            return
        try:
            self._stream.send(message)
        except StreamBrokenError:
            return
        except MisbehaviourError as error:
            self._condemn(error)
            return
        self._poll(self._stream)

    def answer(self, epoch: int, message: msgspec.Struct) -> None:
        """Send to the process that asked, if it is still the one that listens."""
        if epoch == self.epoch:
            self.tell(message)

    def watch(self, give_up: Callable[[], None]) -> None:
        """Start the process again when it ended; give up when none ever came up."""
        if self._process is None or self._process.poll() is None:
            return
        status = self._process.returncode
        self._process = None
        self._drop()
        self._log.error(f"Control plane process exited unexpectedly: {describe_status(status)}")
        if self._was_ever_ready or (status < 0 and self.epoch < STARTS_MAX):
            lived_s = time.monotonic() - self._started_s
            self._timers.after(0 if lived_s > RESTART_DELAY_S else RESTART_DELAY_S, self.start)
        else:
            give_up()

    def stop(self) -> None:
        """Close the stream, upon which the process ends."""
        if self._stream is not None:
            self._stream.close()
        if self._process is None:
            return
        try:
            self._process.wait(END_S_MAX)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _poll(self, stream: ControlPlaneStream) -> None:
        write = selectors.EVENT_WRITE if stream.wants_to_write else 0
        self._selector.modify(stream, selectors.EVENT_READ | write, self._on_stream)

    def _on_stream(self) -> None:
        """Read what came if nothing waits, and obey for a turn; the kernel keeps the rest, and its sender waits."""
        if self._stream is None:
            return
        try:
            self._stream.flush()
            if not self._received:
                self._received.extend(self._stream.receive())
            self._obey_for_a_turn(self._stream)
        except StreamBrokenError:
            self._drop()
        except MisbehaviourError as error:
            self._condemn(error)
        if self._stream is not None:
            self._poll(self._stream)

    def _obey_for_a_turn(self, stream: ControlPlaneStream) -> None:
        """Raises MisbehaviourError for a message out of order."""
        end_s = time.monotonic() + TURN_S_MAX
        while self._received and not stream.is_congested:
            message = self._received.popleft()
            if isinstance(message, Ready) is self._is_ready:
                raise MisbehaviourError(f"out of order: {type(message).__name__}")
            self._is_ready = self._was_ever_ready = True
            self._obey(message)
            if self._stream is not stream:
                return
            if time.monotonic() >= end_s:
                break
        if self._received and not stream.is_congested and not self._is_continuing:
            self._is_continuing = True
            self._timers.after(0, self._continue)

    def _continue(self) -> None:
        self._is_continuing = False
        self._on_stream()

    def _condemn(self, error: MisbehaviourError) -> None:
        """End a process that is broken or taken over; `watch` replaces it."""
        self._log.error(f"Control plane sent what it must not, killed: {error}")
        self._drop()

    def _drop(self) -> None:
        """Let go of a broken stream, and of the process behind it."""
        if self._stream is not None:
            self._selector.unregister(self._stream)
            self._stream.close()
            self._stream = None
            self._received.clear()
        if self._process is not None:
            self._process.kill()
