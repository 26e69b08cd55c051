"""The link to the control plane: its process, the stream to it, and another process when it ends.

Owned by the supervisor's thread. The rules outlive the process: a new one is told them first.
"""

import contextlib
import selectors
import socket
import subprocess
from collections.abc import Callable, Iterable

import msgspec

from logging_shm import Logger
from relay.supervisor.children import describe_status, start_control_plane
from relay.supervisor.stream import ControlPlaneStream, StreamBrokenError
from relay.supervisor.timers import Timers

END_S_MAX = 1.0  # after its stream has closed


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
    ) -> None:
        self._log = log
        self._selector = selector
        self._timers = timers
        self._listener = listener
        self._owner = owner
        self._instance = instance
        self._greeting = greeting
        self._obey = obey
        self._process: subprocess.Popen[bytes] | None = None
        self._stream: ControlPlaneStream | None = None
        self._heard = False

    def start(self) -> None:
        """Start the process and tell it the greeting."""
        self._log.info("Spawning Control Plane worker")
        self._heard = False
        self._process, end = start_control_plane(self._listener, *self._owner, self._instance)
        self._stream = ControlPlaneStream(end)
        self._selector.register(self._stream, selectors.EVENT_READ, self._on_stream)
        for message in self._greeting():
            self.tell(message)

    def tell(self, message: msgspec.Struct) -> None:
        """Send; a stream that is broken is dealt with when its process has ended."""
        if self._stream is None:
            return
        with contextlib.suppress(StreamBrokenError):
            self._stream.send(message)
        self._poll(self._stream)

    def watch(self, give_up: Callable[[], None]) -> None:
        """Start the process again when it ended; give up when nothing was ever heard from it."""
        if self._process is None or self._process.poll() is None:
            return
        status = self._process.returncode
        self._process = None
        self._drop()
        self._log.error(f"Control plane process exited unexpectedly: {describe_status(status)}")
        if self._heard:
            self._timers.after(0, self.start)
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
        if self._stream is None:
            return
        try:
            self._stream.flush()
            messages = self._stream.receive()
        except StreamBrokenError:
            self._drop()
            return
        self._poll(self._stream)
        for message in messages:
            self._heard = True
            self._obey(message)

    def _drop(self) -> None:
        """Let go of a broken stream, and of the process behind it."""
        if self._stream is not None:
            self._selector.unregister(self._stream)
            self._stream.close()
            self._stream = None
        if self._process is not None:
            self._process.kill()
