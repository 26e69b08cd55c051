"""Sinks from their URLs, as a command line or a configuration has them. Errors name the part and what is allowed.

Describing imports nothing that is compiled; opening does.
"""

import ipaddress
import os
import re
import urllib.parse
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from logging_shm.facility import FACILITIES, SEVERITIES
from logging_shm.sinks.selection import DEV_LOG, JOURNAL_SOCKET, Selection, SinkError
from logging_shm.sinks.target import check_log

if TYPE_CHECKING:
    from logging_shm.sinks.base import Sink

SHAPES = {
    "stdout": "stdout:",
    "file": "file:/path/to/the.log",
    "syslog+udp": "syslog+udp://HOST[:PORT]",
    "syslog+tcp": "syslog+tcp://HOST[:PORT]",
    "syslog+unix": "syslog+unix:[/path/to/socket]",
    "journald": "journald:[/path/to/socket]",
}
WITH_HOST = {"syslog+udp", "syslog+tcp"}
WITH_SOCKET = {"syslog+unix", "journald"}
COMMON = {"level", "facility"}
TEXT = {"format", "timestamps", "fields"}
SYSLOG = {"syslog_facility", "application"}
OPTIONS = {
    "stdout": COMMON | TEXT,
    "file": COMMON | TEXT | {"rotate_bytes", "rotate_s", "keep"},
    "syslog+udp": COMMON | SYSLOG,
    "syslog+tcp": COMMON | SYSLOG,
    "syslog+unix": COMMON | SYSLOG,
    "journald": COMMON,
}
FORMATS = ("text", "json")
BOOLEANS = {"yes": True, "no": False}
# RFC 5424, table 1
SYSLOG_FACILITIES = {
    "kern": 0,
    "user": 1,
    "daemon": 3,
    "auth": 4,
    "syslog": 5,
    **{f"local{n}": 16 + n for n in range(8)},
}
SYSLOG_PORT = 514
SYSLOG_TCP_PORT = 601  # RFC 3195's, used for octet counting too
KEEP = 7
KEEP_MAX = 1000  # files that a rotation renames
ROTATE_S_MAX = 366 * 86_400
SOCKET_PATH_BYTES_MAX = 107  # sun_path of unix(7), less its NUL
HOST_NAME = re.compile(r"(?=.{1,253}$)(?!-)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?", re.ASCII)
T = TypeVar("T")
UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


class Described:
    """A sink's URL, checked as far as it can be without opening anything."""

    def __init__(self, url: str, defaults: Selection | None = None, kind: str = "text") -> None:
        """`defaults` and `kind` hold where the URL says nothing. Raises SinkError."""
        self.url = url
        self.scheme, _, rest = url.partition(":")
        if self.scheme not in SHAPES:
            raise self._error(f"expected one of {', '.join(f'{scheme}:' for scheme in SHAPES)}")
        address, _, query = rest.partition("?")
        self.host, self.port, self.path = "", 0, ""
        if self.scheme in WITH_HOST:
            self.host, self.port = self._host_and_port(address)
        else:
            self.path = self._path(address)
        self.options = self._options(query)
        self.kind = self._word("format", {word: word for word in FORMATS}, kind)
        self.rotate_bytes = self._size("rotate_bytes")
        self.rotate_s = self._number("rotate_s", 0, ROTATE_S_MAX)
        self.keep = self._number("keep", KEEP, KEEP_MAX)
        self.selection = self._selection(defaults or Selection())

    def _error(self, problem: str) -> SinkError:
        return SinkError(f"log sink {self.url!r}: {problem}")

    def _host_and_port(self, address: str) -> tuple[str, int]:
        match = re.fullmatch(r"//(?:\[([^\[\]]*)\]|([^\[\]:]*))(?::([^:]*))?", address)
        if match is None:
            raise self._error(f"expected {SHAPES[self.scheme]}, an IPv6 address in brackets")
        literal, name, port = match.groups()
        if literal is not None and not is_ipv6(literal):
            raise self._error(f"host {literal!r} is no IPv6 address")
        if name is not None and not HOST_NAME.fullmatch(name.lower()):
            raise self._error(f"host {name!r}: expected a name or an address; allowed are {SHAPES[self.scheme]}")
        default = SYSLOG_PORT if self.scheme == "syslog+udp" else SYSLOG_TCP_PORT
        if port is not None and not (re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) < 65_536):
            raise self._error(f"port {port!r}: expected a number from 1 to 65535")
        return literal or name, int(port or default)

    def _path(self, address: str) -> str:
        path = re.sub(r"^//(?=/)", "", address)
        if path.startswith("//") or (self.scheme == "stdout" and path) or (self.scheme == "file" and not path):
            raise self._error(f"expected {SHAPES[self.scheme]}")
        path = urllib.parse.unquote(path, errors="surrogateescape")
        try:
            encoded = os.fsencode(path)
        except UnicodeEncodeError:
            raise self._error("the path is no text that a file can be named by") from None
        if b"\0" in encoded:
            raise self._error("the path holds a NUL, which no path can")
        if self.scheme in WITH_SOCKET and len(encoded) > SOCKET_PATH_BYTES_MAX:
            raise self._error(f"the path has {len(encoded)} bytes: a socket's has at most {SOCKET_PATH_BYTES_MAX}")
        return path

    def _options(self, query: str) -> dict[str, str]:
        options: dict[str, str] = {}
        for part in query.split("&") if query else ():
            name, _, value = part.partition("=")
            if name not in OPTIONS[self.scheme]:
                allowed = ", ".join(sorted(OPTIONS[self.scheme]))
                raise self._error(f"unknown option {name!r}; allowed are {allowed}")
            if name in options:
                raise self._error(f"option {name} is given twice")
            options[name] = urllib.parse.unquote_plus(value)
        return options

    def _selection(self, defaults: Selection) -> Selection:
        chosen = defaults.facilities
        if "facility" in self.options:
            names: Iterable[str] = self.options["facility"].lower().split(",")
            chosen = frozenset(self._one_of("facility", name, FACILITIES) for name in names)
        return replace(
            defaults,
            level=self._word("level", SEVERITIES, defaults.level),
            facilities=chosen,
            timestamps=self._word("timestamps", BOOLEANS, defaults.timestamps),
            fields=self._word("fields", BOOLEANS, defaults.fields),
            syslog_facility=self._word("syslog_facility", SYSLOG_FACILITIES, defaults.syslog_facility),
            application=self._application(defaults.application),
        )

    def _application(self, default: str) -> str:
        name = self.options.get("application", default)
        if not re.fullmatch(r"[!-~]{1,48}", name):  # RFC 5424, 6: APP-NAME
            raise self._error(f"application {name!r}: expected 1 to 48 printable ASCII characters")
        return name

    def _word(self, option: str, allowed: dict[str, T], default: T) -> T:
        value = self.options.get(option)
        return default if value is None else self._one_of(option, value.lower(), allowed)

    def _one_of(self, option: str, value: str, allowed: dict[str, T]) -> T:
        if value not in allowed:
            raise self._error(f"{option} {value!r}: allowed are {', '.join(allowed)}")
        return allowed[value]

    def _number(self, option: str, default: int, most: int) -> int:
        value = self.options.get(option, str(default))
        if not re.fullmatch(r"[0-9]{1,12}", value) or int(value) > most:
            raise self._error(f"{option} {value!r}: expected a number from 0 to {most}")
        return int(value)

    def _size(self, option: str) -> int:
        value = self.options.get(option, "0")
        match = re.fullmatch(r"([0-9]{1,12})([kmg]?)", value.lower(), re.ASCII)
        if match is None:
            raise self._error(f"{option} {value!r}: expected a number of bytes such as 500000, 100M or 1G")
        return int(match[1]) * UNITS[match[2]]

    def check(self) -> None:
        """Raises SinkError for a file that can't be written. Leaves none behind."""
        if self.scheme == "file":
            try:
                check_log(Path(self.path))
            except OSError as error:
                raise self._not_writable(error) from None

    def _not_writable(self, error: OSError) -> SinkError:
        return self._error(f"{error.strerror}: choose a path that can be written")

    def open(self) -> "Sink":
        """The sink. Raises SinkError for what can't be opened here; other targets may come up later."""
        from logging_shm.sinks.file import FileSink
        from logging_shm.sinks.journald import JournaldSink
        from logging_shm.sinks.stream import StreamSink
        from logging_shm.sinks.syslog import SyslogSink, SyslogTcpSink

        match self.scheme:
            case "stdout":
                try:
                    return StreamSink(kind=self.kind, selection=self.selection)
                except OSError as error:
                    raise self._error(f"{error.strerror}: open it, or choose another sink") from None
            case "file":
                try:
                    return FileSink(self.path, self.kind, self.selection, self.rotate_bytes, self.rotate_s, self.keep)
                except OSError as error:
                    raise self._not_writable(error) from None
            case "syslog+udp":
                return SyslogSink((self.host, self.port), self.selection)
            case "syslog+tcp":
                return SyslogTcpSink((self.host, self.port), self.selection)
            case "syslog+unix":
                return SyslogSink(self.path or DEV_LOG, self.selection)
            case _:
                return JournaldSink(self.path or JOURNAL_SOCKET, self.selection)


def is_ipv6(text: str) -> bool:
    """Whether a text is an IPv6 address, perhaps with a scope such as %eth0."""
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return text.isascii() and text.isprintable()
