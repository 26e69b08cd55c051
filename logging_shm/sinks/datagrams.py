"""Datagrams, one a message: what syslog over UDP or a unix socket and journald have in common."""

import contextlib
import errno
import os
import select
import socket
from typing import Any

from logging_shm.sinks.base import Chunk, Sink, messages
from logging_shm.sinks.selection import Selection

TOO_LONG = errno.EMSGSIZE
TIMEOUT_S = 5.0  # for a receiver on this host that reads nothing
PROBE_MS = 200  # within which a host that is near says that nobody listens


class DatagramSink(Sink):
    """Sends each message as a datagram. A message that is too long for the socket is lost, and counted."""

    def __init__(self, name: str, kind: str, selection: Selection | None, address: str | tuple[str, int]) -> None:
        super().__init__(name, kind, selection)
        self._address = address
        self._socket: socket.socket | None = None
        self._failures = 0

    def deliver(self, chunk: Chunk) -> None:
        """Send what was not sent yet; connect first where that is due."""
        try:
            probe = self._socket is None
            target = self._socket = self._socket or connect(self._address, self._failures)
            for message in messages(chunk, self.done):
                if self.ended:
                    break
                self._send(target, message, probe)
                probe = False
        except OSError:
            self._failures += 1
            self.close_target()
            raise

    def _send(self, target: socket.socket, message: bytes, probe: bool) -> None:
        """Send one. An ICMP error comes after what caused it: on this host at once, from a near one with the probe."""
        try:
            target.send(message)
        except OSError as error:
            if error.errno != TOO_LONG:
                raise
            self.refuse(f"a message of {len(message)} bytes is too long")
            return
        if probe and target.family != socket.AF_UNIX:
            poll = select.poll()
            poll.register(target, 0)  # POLLERR comes unasked
            poll.poll(PROBE_MS)
        failure = target.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if failure:
            raise OSError(failure, os.strerror(failure))
        self.advance(1)

    def close_target(self) -> None:
        """Close the socket; the next chunk connects again."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.close()
            self._socket = None


def connect(address: str | tuple[str, int], failures: int) -> socket.socket:
    """A datagram socket connected to a path or host. Of a host's addresses, the next after each failure.

    Raises OSError.
    """
    if isinstance(address, str):
        choices: list[tuple[socket.AddressFamily, Any]] = [(socket.AF_UNIX, address)]
    else:
        found = socket.getaddrinfo(*address, type=socket.SOCK_DGRAM)
        choices = [(family, sockaddr) for family, _, _, _, sockaddr in found]
    family, sockaddr = choices[failures % len(choices)]
    target = socket.socket(family, socket.SOCK_DGRAM)
    try:
        target.settimeout(TIMEOUT_S)
        target.connect(sockaddr)
    except OSError:
        target.close()
        raise
    return target
