"""A client of the control socket: one request, one answer. Used by mcrctl and by whoever scripts the relay.

    with Client() as client:
        client.add_rule(Rule(input_group="239.1.1.1", input_port=5001, outputs=(Output("239.2.2.2", 6001, "eth1"),)))

The process behind the socket may end at any time, and is replaced within a second. A request whose answer is lost is
sent again: a look costs nothing, and a change carries an id under which the relay makes it once. Look at docs/api.md.
"""

import contextlib
import os
import socket
import struct
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from relay import calls
from relay.api import ActiveRule, Added, Answer, ListWorkers, Pong, Removed, Request, Restart
from relay.calls import RETRY_S, SILENCE_S, TIMEOUT_S, BrokenError, Call, Result
from relay.config import socket_path
from relay.credentials import peer_of
from relay.errors import UnreachableError
from relay.messages import Stats, WorkerStats
from relay.rules import Rule

TIMEVAL = struct.Struct("@ll")  # struct timeval


class Client:
    """A connection to the relay behind a control socket; a context manager. For one thread at a time.

    Every method raises ControlError when the relay refuses, and has changed nothing then, and UnreachableError when it
    does not answer within `timeout_s`. Both are RelayErrors, whose text says what, why and the remedy.
    """

    def __init__(
        self,
        path: Path | str | None = None,
        timeout_s: float = TIMEOUT_S,
        *,
        instance: str | None = None,
        on_silence: Callable[[str], None] | None = None,
    ) -> None:
        """Connect to the control socket at `path`, or to that of `instance`. Raises UnreachableError.

        `on_silence` is told in a line what is waited for, once, when an answer takes more than two seconds.
        """
        self._path = Path(path) if path is not None else socket_path(None, instance)
        self._timeout_s = timeout_s
        self._on_silence = on_silence
        self._socket: socket.socket | None = None
        self._connect(time.monotonic() + timeout_s)

    def _connect(self, deadline_s: float) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # The kernel lets those that wait for room in the listener's queue in one after the other; with Python's own
        # timeout the socket is non-blocking, and a full queue an error. man 2 connect, EAGAIN.
        left_s = max(deadline_s - time.monotonic(), 0.001)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, TIMEVAL.pack(int(left_s), int(left_s % 1 * 1e6)))
        try:
            sock.connect(str(self._path))
        except OSError as error:
            sock.close()
            raise calls.unreachable(self._path, error) from error
        self._socket = sock
        return sock

    def ask(self, request: Request) -> Answer:
        """Send a request and return its answer as it came. Raises ControlError when it is refused, UnreachableError.

        When the connection breaks it is opened again and the request repeated, until the timeout.
        """
        request = calls.repeatable(request)
        line = calls.encode(request)
        deadline_s = time.monotonic() + self._timeout_s
        while True:
            try:
                received = self._exchange(line, deadline_s)
                break
            except BrokenError as error:
                if not isinstance(request, calls.REPEATED) or time.monotonic() + RETRY_S > deadline_s:
                    raise calls.lost(self._path, request, str(error)) from error
                time.sleep(RETRY_S)
        return calls.decode(received)

    def _exchange(self, line: bytes, deadline_s: float) -> bytes:
        """Raises BrokenError when the connection ends, UnreachableError when no answer comes in time.

        After either of them, as after any other exception, the connection is closed: a late answer must not be taken
        for that of the next request.
        """
        sock = self._socket or self._connect(deadline_s)
        answer = calls.Line()
        try:
            sock.settimeout(max(deadline_s - time.monotonic(), 0.001))
            # A relay that refuses the connection says why and closes it: that stands to be read when sending fails.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(line)
            while True:
                received = answer.feed(self._receive(sock, deadline_s))
                if received is not None:
                    return received
        except BaseException as error:
            self.close()
            if isinstance(error, TimeoutError):
                raise calls.too_slow(self._path, self._timeout_s) from error
            if isinstance(error, OSError):
                raise BrokenError(str(error)) from error
            raise

    def _receive(self, sock: socket.socket, deadline_s: float) -> bytes:
        if self._on_silence is not None:
            sock.settimeout(max(min(deadline_s - time.monotonic(), SILENCE_S), 0.001))
            with contextlib.suppress(TimeoutError):
                return sock.recv(calls.RECEIVE_BYTES)
            tell, self._on_silence = self._on_silence, None
            tell(calls.silent(self._path, _gone(sock), max(deadline_s - time.monotonic(), 0.0)))
        sock.settimeout(max(deadline_s - time.monotonic(), 0.001))
        return sock.recv(calls.RECEIVE_BYTES)

    def _call(self, call: Call[Result]) -> Result:
        return call.read(self.ask(call.request))

    # --- commands ---------------------------------------------------------------------------------

    def ping(self) -> Pong:
        """Whether the relay serves, and its version."""
        return self._call(calls.ping())

    def stats(self) -> Stats:
        """Totals since the start, rates over the last second: of the relay, its rules, outputs and workers."""
        return self._call(calls.stats())

    def rules(self) -> list[ActiveRule]:
        """The active rules, each with its state."""
        return self._call(calls.rules())

    def workers(self) -> list[WorkerStats]:
        """The workers with their counters."""
        return self._call(calls.workers())

    def add_rule(self, rule: Rule, *, replace: bool = False) -> Added:
        """Make a rule active. One that is there already is no error; other content under its id is, or replaced."""
        return self.add_rules((rule,), replace=replace)

    def add_rules(self, rules: Iterable[Rule], *, replace: bool = False) -> Added:
        """Make rules active, all or none, in one change."""
        return self._call(calls.add_rules(rules, replace))

    def remove_rule(self, rule_id: str) -> Removed:
        """Remove a rule."""
        return self.remove_rules((rule_id,))

    def remove_rules(self, rule_ids: Iterable[str]) -> Removed:
        """Remove rules, all or none, in one change."""
        return self._call(calls.remove_rules(rule_ids))

    def log_levels(self, *, facility: str | None = None, core: int | None = None) -> dict[str, str]:
        """The least severity that is logged, by ring."""
        return self._call(calls.log_level(None, facility, core))

    def set_log_level(self, level: str, *, facility: str | None = None, core: int | None = None) -> dict[str, str]:
        """Log records as grave as `level` or graver, everywhere or in one facility or worker."""
        return self._call(calls.log_level(level, facility, core))

    def restart(self, timeout_s: float = calls.RESTART_S_MAX) -> int:
        """Start the relay anew, as after an upgrade; return how many workers were replaced, once all are.

        Sockets and rules stay, and no datagram is lost.
        """
        deadline_s = time.monotonic() + timeout_s
        former = calls.pids(self.ask(ListWorkers()).result)
        self._on_silence = None  # the new program is checked first, which takes its time
        with contextlib.suppress(UnreachableError):  # it may be gone before it has answered
            self.ask(Restart())
        while not self._are_replaced(former):
            if time.monotonic() > deadline_s:
                raise calls.not_replaced(self._path, timeout_s)
            time.sleep(calls.RESTART_POLL_S)
        return len(former)

    def _are_replaced(self, former: frozenset[int]) -> bool:
        try:
            return calls.are_replaced(self.ask(ListWorkers()).result, former)
        except UnreachableError:
            return False

    # --- life -------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the connection. The next request opens another one."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _gone(sock: socket.socket) -> int | None:
    """The pid of who listens at the other end, if that process has ended. Templates keep the socket of a dead mcrd."""
    pid, _, _ = peer_of(sock)
    with contextlib.suppress(PermissionError):
        try:
            if pid:  # 0: it can't be seen from this pid namespace
                os.kill(pid, 0)
        except ProcessLookupError:
            return pid
    return None
