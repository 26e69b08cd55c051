"""A client of the control socket: one request, one answer. Used by mcrctl and by whoever scripts the relay."""

import socket
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from relay.api import Answer, Request
from relay.errors import ControlError, UnreachableError

TIMEOUT_S = 30.0  # ten thousand rules are installed in a fraction of it


class Client:
    """A connection to the relay behind a control socket; a context manager."""

    def __init__(self, path: Path, timeout_s: float = TIMEOUT_S) -> None:
        """Connect. Raises UnreachableError when no relay listens there."""
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.connect(str(path))
        except OSError as error:
            self._socket.close()
            raise UnreachableError(
                f"no relay answers on {path}: {error.strerror}: start one with `sudo make run IFACE=…`, "
                "or give --socket or --instance"
            ) from error
        self._stream = self._socket.makefile("rb")

    def ask(self, request: Request) -> Answer:
        """Send a request and return its answer. Raises ControlError when it is refused, UnreachableError."""
        try:
            self._socket.sendall(msgspec.json.encode(request) + b"\n")
            line = self._stream.readline()
        except OSError as error:
            raise UnreachableError(f"{self._path}: no answer: {error}") from error
        if not line:
            raise UnreachableError(f"{self._path}: the relay closed the connection")
        answer = msgspec.json.decode(line, type=Answer)
        if not answer.ok:
            raise ControlError(answer.error or "refused without a reason")
        return answer

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
