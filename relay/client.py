"""A client of the control socket: one request, one answer. Used by mcrctl and by whoever scripts the relay.

The process behind the socket may end at any time, and is replaced within a second. A request whose answer is lost is
sent again: a look costs nothing, and a change carries an id under which the relay makes it once.
"""

import contextlib
import os
import socket
import struct
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from relay.api import Answer, Change, GetOptions, GetStats, ListRules, ListWorkers, LogLevel, Ping, Request
from relay.errors import ControlError, UnreachableError

TIMEOUT_S = 30.0  # ten thousand rules are installed in a fraction of it
RETRY_S = 0.02
TIMEVAL = struct.Struct("@ll")  # struct timeval
REPEATED = Change | GetOptions | ListRules | GetStats | ListWorkers | LogLevel | Ping  # a level set twice is set


class BrokenError(Exception):
    """The connection ended before the answer."""


class Client:
    """A connection to the relay behind a control socket; a context manager."""

    def __init__(self, path: Path, timeout_s: float = TIMEOUT_S) -> None:
        """Connect. Raises UnreachableError when no relay listens there."""
        self._path = path
        self._timeout_s = timeout_s
        self._connect(time.monotonic() + timeout_s)

    def _connect(self, deadline_s: float) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # The kernel lets those that wait for room in the listener's queue in one after the other; with Python's own
        # timeout the socket is non-blocking, and a full queue an error. man 2 connect, EAGAIN.
        left_s = max(deadline_s - time.monotonic(), 0.001)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, TIMEVAL.pack(int(left_s), int(left_s % 1 * 1e6)))
        try:
            self._socket.connect(str(self._path))
        except OSError as error:
            self._socket.close()
            reason = "its queue of clients stayed full" if isinstance(error, BlockingIOError) else error.strerror
            raise UnreachableError(
                f"no relay answers on {self._path}: {reason}: start one with `sudo make run IFACE=…`, "
                "or give --socket or --instance"
            ) from error
        self._stream = self._socket.makefile("rb")

    def ask(self, request: Request) -> Answer:
        """Send a request and return its answer. Raises ControlError when it is refused, UnreachableError.

        When the connection breaks it is opened again and the request repeated, until the timeout.
        """
        if isinstance(request, Change) and request.change_id is None:
            request = msgspec.structs.replace(request, change_id=os.urandom(16).hex())
        line = msgspec.json.encode(request) + b"\n"
        deadline_s = time.monotonic() + self._timeout_s
        while True:
            try:
                received = self._exchange(line, deadline_s)
                break
            except BrokenError as error:
                self.close()
                if not isinstance(request, REPEATED) or time.monotonic() + RETRY_S > deadline_s:
                    raise UnreachableError(self._lost(request, str(error))) from error
                time.sleep(RETRY_S)
                self._connect(deadline_s)
        answer = msgspec.json.decode(received, type=Answer)
        if not answer.ok:
            raise ControlError(answer.error or "refused without a reason")
        return answer

    def _exchange(self, line: bytes, deadline_s: float) -> bytes:
        """Raises BrokenError when the connection ends, UnreachableError when no answer comes in time."""
        self._socket.settimeout(max(deadline_s - time.monotonic(), 0.001))
        try:
            # A relay that refuses the connection says why and closes it: that stands to be read when sending fails.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._socket.sendall(line)
            received = self._stream.readline()
        except TimeoutError as error:
            raise UnreachableError(f"{self._path}: no answer within {self._timeout_s:.0f} s") from error
        except OSError as error:
            raise BrokenError(str(error)) from error
        if not received.endswith(b"\n"):
            raise BrokenError("the relay closed the connection")
        return received

    def _lost(self, request: Request, reason: str) -> str:
        if isinstance(request, Change):
            return f"{self._path}: {reason} before it answered: `mcrctl list-rules` tells whether it made the change"
        return f"{self._path}: {reason} before it answered"

    def close(self) -> None:
        """Close the connection."""
        self._stream.close()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
