"""What a service manager is told: ready, alive, what is going on, ending. man 3 sd_notify.

Owned by the supervisor's thread, and told from its loop alone: a loop that hangs is no sign of life. Without
NOTIFY_SOCKET in the environment nothing is sent. The loop never waits for the manager: what finds no room is sent in a
later turn, or given up when another of its kind will follow.
"""

import os
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping

from relay.supervisor.timers import Timers

STATUS_INTERVAL_S = 5.0
WAITING_MAX = 16  # changes of state that a manager has not read; the latest count


def watchdog_interval_s(environment: Mapping[str, str], pid: int) -> float | None:
    """How often the manager wants a sign of life of this process: half of its limit. None when it wants none."""
    limit_us = environment.get("WATCHDOG_USEC", "")
    if not limit_us.isascii() or not limit_us.isdecimal() or int(limit_us) == 0:
        return None
    if environment.get("WATCHDOG_PID", str(pid)) != str(pid):
        return None
    return int(limit_us) / 2e6


def manager_address(environment: Mapping[str, str]) -> str | None:
    """Where the manager listens: a path, or @ and an abstract name. None for no manager, or none of this kind."""
    name = environment.get("NOTIFY_SOCKET", "")
    if name.startswith("@"):
        return "\0" + name[1:]
    return name if name.startswith("/") else None


class ServiceManager:
    """The manager's view of this supervisor."""

    def __init__(self, timers: Timers, is_ready: Callable[[], bool], status: Callable[[], str]) -> None:
        self._timers = timers
        self._is_ready = is_ready
        self._status = status
        self._was_ready = False
        self._address = manager_address(os.environ)
        self._watchdog_s = watchdog_interval_s(os.environ, os.getpid())
        self._waiting: deque[bytes] = deque(maxlen=WAITING_MAX)
        self._socket: socket.socket | None = None
        if self._address is not None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)

    def start(self) -> None:
        """Tell regularly from now on."""
        if self._socket is None:
            return
        if self._watchdog_s is not None:
            self._beat()
        self._report()

    def look(self) -> None:
        """Once a turn of the loop: tell when everything runs for the first time, and what found no room before."""
        if not self._was_ready and self._is_ready():
            self._was_ready = True
            self._tell("READY=1", f"STATUS={self._status()}")
        self._flush()

    def reloading(self) -> None:
        """The configuration is read again, or the program starts anew: `reloaded`, or its READY=1, follows."""
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def reloaded(self) -> None:
        """It has been read."""
        self._tell("READY=1")

    def stopping(self) -> None:
        """The end begins."""
        self._tell("STOPPING=1", "STATUS=Workers relay what their rings hold, then end")

    def close(self) -> None:
        """Tell nothing any more."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _beat(self) -> None:
        assert self._watchdog_s is not None
        self._timers.after(self._watchdog_s, self._beat)
        self._flush()
        self._has_sent(b"WATCHDOG=1")

    def _report(self) -> None:
        self._timers.after(STATUS_INTERVAL_S, self._report)
        if self._was_ready and not self._waiting:
            self._has_sent(f"STATUS={self._status()}".encode())

    def _tell(self, *lines: str) -> None:
        """What is told only once, in order."""
        self._waiting.append("\n".join(lines).encode())
        self._flush()

    def _flush(self) -> None:
        while self._waiting and self._has_sent(self._waiting[0]):
            self._waiting.popleft()

    def _has_sent(self, message: bytes) -> bool:
        """False when there is no room. Without a manager, or when it has gone, there is nothing to wait for."""
        if self._socket is None or self._address is None:
            return True
        try:
            self._socket.sendto(message, self._address)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True
