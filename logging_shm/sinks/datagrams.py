"""Datagrams, one a message: what syslog over UDP or a unix socket and journald have in common."""

import contextlib
import errno
import socket

from logging_shm.sinks.base import Chunk, Sink, messages
from logging_shm.sinks.selection import Selection

TOO_LONG = (errno.EMSGSIZE,)


class DatagramSink(Sink):
    """Sends each message as a datagram. A message that is too long for the socket is lost, and counted."""

    def __init__(
        self,
        name: str,
        kind: str,
        selection: Selection | None,
        family: socket.AddressFamily,
        address: str | tuple[str, int],
    ) -> None:
        super().__init__(name, kind, selection)
        self._family = family
        self._address = address
        self._socket: socket.socket | None = None
        self._sent = 0  # messages of the present chunk: it goes on behind them after a failure

    def deliver(self, chunk: Chunk) -> int:
        """Send what was not sent yet; connect first where that is due."""
        if self._socket is None:
            self._socket = socket.socket(self._family, socket.SOCK_DGRAM)
            try:
                self._socket.connect(self._address)
            except OSError:
                self.close_target()
                raise
        done = 0
        for index, message in enumerate(messages(chunk)):
            if index < self._sent:
                continue
            try:
                self._socket.send(message)
                done += 1
            except OSError as error:
                if error.errno not in TOO_LONG:
                    self.close_target()
                    raise
            self._sent = index + 1
        self._sent = 0
        return done

    def close_target(self) -> None:
        """Close the socket; the next chunk connects again."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.close()
            self._socket = None
