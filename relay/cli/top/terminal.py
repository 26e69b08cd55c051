"""The terminal: keys one by one, unseen, and everything as it was before, whatever happens.

Signals that would end or stop the process wake the loop instead, which leaves in order; SIGKILL alone can't be helped.
Source: man 3 termios, man 7 signal.
"""

import contextlib
import os
import select
import signal
import sys
import termios
import tty
from collections.abc import Iterator
from types import FrameType

from relay.cli.top.keys import Keys

ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)
ESCAPE_WAIT_S = 0.1  # for what may follow an escape; longer than a packet of ssh takes
READ_BYTES = 1024


class Terminal:
    """Keys and signals of the controlling terminal. A context manager."""

    def __init__(self) -> None:
        self._fd = sys.stdin.fileno()
        self._keys = Keys()
        self._former_handlers: dict[int, object] = {}
        self.ended = False  # by a signal, or as the terminal is gone
        self.stopping = False  # Ctrl-Z

    def __enter__(self) -> "Terminal":
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._attributes = termios.tcgetattr(self._fd)
        for number in (*ENDING, signal.SIGTSTP, signal.SIGWINCH):
            self._former_handlers[number] = signal.signal(number, self._on_signal)
        self._former_wakeup = signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        tty.setcbreak(self._fd)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(termios.error):  # it may be gone
            termios.tcsetattr(self._fd, termios.TCSAFLUSH, self._attributes)
        signal.set_wakeup_fd(self._former_wakeup)
        for number, handler in self._former_handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTSTP:
            self.stopping = True
        elif number != signal.SIGWINCH:
            self.ended = True

    def wake(self) -> None:
        """Let `wait` return; from any thread."""
        with contextlib.suppress(OSError):
            os.write(self._wake_write, b"\0")

    def wait(self, timeout_s: float) -> list[str]:
        """The keys that were pressed, as soon as there are any; none after `timeout_s`, or when something happened."""
        wait_s = min(timeout_s, ESCAPE_WAIT_S) if self._keys.is_waiting else timeout_s
        ready, _, _ = select.select([self._fd, self._wake_read], [], [], max(wait_s, 0))
        if self._wake_read in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_read, READ_BYTES)
        if self._fd not in ready:
            return [] if ready or not self._keys.is_waiting else self._keys.flush()
        try:
            received = os.read(self._fd, READ_BYTES)
        except OSError:
            received = b""
        self.ended = self.ended or not received
        return self._keys.feed(received)

    @contextlib.contextmanager
    def as_before(self) -> Iterator[None]:
        """The terminal as it was, for as long as the process is stopped."""
        self.stopping = False
        termios.tcsetattr(self._fd, termios.TCSADRAIN, self._attributes)
        try:
            yield
        finally:
            tty.setcbreak(self._fd)
