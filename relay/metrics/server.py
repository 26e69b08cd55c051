"""Metrics over HTTP: on a TCP address or a unix socket, until a signal ends it.

Owned by `mcrctl metrics`. A thread for each connection, of which there are few and short ones: who sends slowly or
takes nothing is let go of after CONNECTION_S_MAX, and who finds all places taken is closed at once.
"""

import contextlib
import ipaddress
import os
import socket
import socketserver
import stat
import sys
import threading
import wsgiref.simple_server
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.registry import Collector

from relay.addresses import endpoint
from relay.errors import ConfigError, UsageError

CONNECTIONS_MAX = 8
CONNECTION_S_MAX = 20.0  # of which a relay that does not answer may take collector.ASK_S_MAX
PORT_MAX = 65_535
SOCKET_MODE = 0o666
UNIX = "unix:"

Address = tuple[str, int] | Path


def parse_listen(text: str) -> Address:
    """`ADDRESS:PORT`, `[IPV6]:PORT` or `unix:PATH`. Raises UsageError."""
    if text.startswith(UNIX):
        path = Path(text.removeprefix(UNIX))
        if not path.is_absolute():
            raise UsageError(f"--listen {text}: give an absolute path, such as unix:/run/mcr-metrics/metrics.sock")
        return path
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") if host.startswith("[") else host
    try:
        ipaddress.ip_address(host)
    except ValueError:
        host = ""
    if not host or not port.isascii() or not port.isdecimal() or int(port) > PORT_MAX:
        raise UsageError(
            f"--listen {text}: expected ADDRESS:PORT with an IP address, such as 127.0.0.1:9464, or unix:PATH"
        )
    return host, int(port)


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class _Handler(wsgiref.simple_server.WSGIRequestHandler):
    def setup(self) -> None:
        """A unix socket's client has no address; WSGI wants one."""
        self.client_address = self.client_address or ("", 0)
        super().setup()

    def address_string(self) -> str:
        return "client"  # no name look-ups

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are no news."""

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the client has gone
            super().handle()


class _Server(socketserver.ThreadingMixIn, wsgiref.simple_server.WSGIServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, family: int, address: Any) -> None:
        self.address_family = family
        self._places = threading.BoundedSemaphore(CONNECTIONS_MAX)
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """As TCPServer binds; HTTPServer would look its own name up."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "mcr", 0
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        end = threading.Timer(CONNECTION_S_MAX, _cut, (request,))  # whatever the client does, byte by byte
        end.daemon = True
        end.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            end.cancel()
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went or stalled is no news; what is wrong with the relay is told by the collector."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def _remove_stale(path: Path) -> None:
    """Remove a socket that nobody listens on any more. Raises ConfigError for anything else of that name."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode) or status.st_uid not in (0, os.geteuid()):
        raise ConfigError(f"--listen unix:{path}: something else has this name: remove it, or give another")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError as error:
            raise ConfigError(f"--listen unix:{path}: {error}: give another path") from error
    raise ConfigError(f"--listen unix:{path}: a process listens there already: end it, or give another path")


@contextlib.contextmanager
def _listening(address: Address) -> Iterator[_Server]:
    """Raises ConfigError, OSError."""
    if not isinstance(address, Path):
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        with _Server(family, address) as server:
            yield server
        return
    _remove_stale(address)
    with _Server(socket.AF_UNIX, str(address)) as server:
        inode = address.lstat().st_ino
        address.chmod(SOCKET_MODE)
        try:
            yield server
        finally:
            with contextlib.suppress(FileNotFoundError):
                if address.lstat().st_ino == inode:
                    address.unlink()


@contextlib.contextmanager
def serving(address: Address, collector: Collector) -> Iterator[tuple[str, Callable[[], None]]]:
    """Where metrics are to be had from now on, and a function that serves them. Raises ConfigError.

    The function returns when an exception, such as of a signal, interrupts it.
    """
    registry = CollectorRegistry()
    registry.register(collector)
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(_listening(address))
        except OSError as error:
            shown = f"{UNIX}{address}" if isinstance(address, Path) else endpoint(*address)
            reason = error.strerror or error
            raise ConfigError(f"--listen {shown}: {reason}: give a free address of this host") from error
        server.set_app(make_wsgi_app(registry))
        yield _name(server, address), server.serve_forever


def _name(server: _Server, address: Address) -> str:
    if isinstance(address, Path):
        return f"{UNIX}{address}"
    host, port = server.socket.getsockname()[:2]  # port 0 is any free one
    return f"http://{endpoint(host, port)}/metrics"
