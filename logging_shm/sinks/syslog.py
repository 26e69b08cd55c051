"""Syslog, RFC 5424: over UDP (RFC 5426), a unix datagram socket, or TCP with octet counting (RFC 6587)."""

import contextlib
import socket

from logging_shm.sinks.base import Chunk, Sink, messages
from logging_shm.sinks.datagrams import DatagramSink
from logging_shm.sinks.selection import Selection

TIMEOUT_S = 5.0


class SyslogSink(DatagramSink):
    """To a UDP address or a unix datagram socket such as /dev/log."""

    def __init__(self, address: str | tuple[str, int], selection: Selection | None = None) -> None:
        if isinstance(address, str):
            family, name = socket.AF_UNIX, address
        else:
            family, name = _family(address[0]), f"{address[0]}:{address[1]}"
        super().__init__(f"syslog {name}", "syslog", selection, family, address)


class SyslogTcpSink(Sink):
    """To a TCP address, each message behind its length."""

    def __init__(self, address: tuple[str, int], selection: Selection | None = None) -> None:
        super().__init__(f"syslog tcp {address[0]}:{address[1]}", "syslog", selection)
        self._address = address
        self._socket: socket.socket | None = None

    def deliver(self, chunk: Chunk) -> int:
        """Send a chunk. After a broken connection it is sent again as a whole: rather twice than never."""
        if self._socket is None:
            self._socket = socket.create_connection(self._address, TIMEOUT_S)
        try:
            self._socket.sendall(b"".join(b"%d %b" % (len(message), message) for message in messages(chunk)))
        except OSError:
            self.close_target()
            raise
        return len(chunk.ends)

    def close_target(self) -> None:
        """Close the connection; the next chunk opens another."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.close()
            self._socket = None


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
