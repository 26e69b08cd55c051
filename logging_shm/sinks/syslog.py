"""Syslog, RFC 5424: over UDP (RFC 5426), a unix datagram socket, or TCP with octet counting (RFC 6587)."""

import contextlib
import errno
import fcntl
import os
import select
import socket
import sys
import termios
import time

import numpy as np

from logging_shm.sinks.base import Chunk, Sink, messages
from logging_shm.sinks.datagrams import DatagramSink
from logging_shm.sinks.selection import Selection

TIMEOUT_S = 5.0  # without any progress
PAUSE_MS_MIN = 1
PAUSE_MS_MAX = 20


class SyslogSink(DatagramSink):
    """To a UDP address or a unix datagram socket such as /dev/log."""

    def __init__(self, address: str | tuple[str, int], selection: Selection | None = None) -> None:
        name = address if isinstance(address, str) else f"{address[0]}:{address[1]}"
        super().__init__(f"syslog {name}", "syslog", selection, address)


class SyslogTcpSink(Sink):
    """To a TCP address, each message behind its length.

    A message counts as written when the peer's kernel has acknowledged it: what was under way when a connection
    broke is sent again. What the peer's kernel had and its program never read, nobody can know (RFC 6587, 3.1).
    """

    def __init__(self, address: tuple[str, int], selection: Selection | None = None) -> None:
        super().__init__(f"syslog tcp {address[0]}:{address[1]}", "syslog", selection)
        self._address = address
        self._socket: socket.socket | None = None

    def deliver(self, chunk: Chunk) -> None:
        """Send what is left of a chunk, and wait until it has arrived."""
        if self._socket is not None and peer_has_closed(self._socket, 0):
            self.close_target()
        if self._socket is None:
            self._socket = socket.create_connection(self._address, TIMEOUT_S)
        frames = [b"%d %b" % (len(message), message) for message in messages(chunk, self.done)]
        ends = np.cumsum([len(frame) for frame in frames])
        data = memoryview(b"".join(frames))
        sent = 0
        try:
            while sent < len(data):
                sent += self._socket.send(data[sent:])  # each waits up to TIMEOUT_S for some room
            await_acknowledged(self._socket)
        except OSError:
            arrived = sent - unacknowledged(self._socket)
            self.close_target()
            self.advance(int(np.searchsorted(ends, arrived, "right")))
            raise
        self.advance(len(frames))

    def close_target(self) -> None:
        """Close the connection; the next chunk opens another."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.close()
            self._socket = None


def unacknowledged(connection: socket.socket) -> int:
    """Bytes that the peer's kernel has not acknowledged: SIOCOUTQ, tcp(7); known after the connection broke, too."""
    return int.from_bytes(fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


def peer_has_closed(connection: socket.socket, wait_ms: int) -> bool:
    """Whether the peer has closed, waiting for that. What it says is of no interest."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    if not poll.poll(wait_ms):
        return False
    try:
        return not connection.recv(65_536)
    except ConnectionError:
        return True


def await_acknowledged(connection: socket.socket) -> None:
    """Wait for the peer's kernel. Raises OSError when it closes meanwhile, or nothing moves for TIMEOUT_S."""
    left, since_s, pause_ms = unacknowledged(connection), time.monotonic(), PAUSE_MS_MIN
    while left:
        if peer_has_closed(connection, pause_ms):
            raise OSError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        pause_ms = min(2 * pause_ms, PAUSE_MS_MAX)
        before, left = left, unacknowledged(connection)
        if left != before:
            since_s = time.monotonic()
        elif time.monotonic() - since_s > TIMEOUT_S:
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
