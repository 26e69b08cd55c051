"""Sinks from their URLs, as a command line or a configuration has them. Errors name the part and what is allowed.

Describing imports nothing that is compiled; opening does.
"""

import re
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from logging_shm.facility import Facility, Severity
from logging_shm.sinks.selection import Selection, SinkError

if TYPE_CHECKING:
    from logging_shm.sinks.base import Sink

SCHEMES = ("stdout", "file", "syslog+udp", "syslog+tcp", "syslog+unix", "journald")
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
DEV_LOG = "/dev/log"
JOURNAL_SOCKET = "/run/systemd/journal/socket"
KEEP = 7
T = TypeVar("T")
UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


class Described:
    """A sink's URL, checked as far as it can be without opening anything."""

    def __init__(self, url: str, defaults: Selection | None = None, kind: str = "text") -> None:
        """`defaults` and `kind` hold where the URL says nothing. Raises SinkError."""
        self.url = url
        parts = urllib.parse.urlsplit(url)
        self.scheme = parts.scheme
        if self.scheme not in SCHEMES:
            raise SinkError(f"log sink {url!r}: expected one of {', '.join(f'{scheme}:' for scheme in SCHEMES)}")
        self.path = parts.path
        try:
            self.host, self.port = parts.hostname, parts.port
        except ValueError:
            raise SinkError(f"log sink {url!r}: the port is no number from 0 to 65535") from None
        self.options = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
        unknown = set(self.options) - OPTIONS[self.scheme]
        if unknown:
            allowed = ", ".join(sorted(OPTIONS[self.scheme]))
            raise SinkError(f"log sink {url!r}: unknown option {min(unknown)}; allowed are {allowed}")
        self._check_address()
        self.kind = self._word("format", {word: word for word in FORMATS}, kind)
        self.rotate_bytes = self._size("rotate_bytes")
        self.rotate_s = self._size("rotate_s")
        self.keep = self._size("keep", KEEP)
        self.selection = self._selection(defaults or Selection())

    def _check_address(self) -> None:
        if self.scheme == "file" and (not self.path or self.host):
            raise SinkError(f"log sink {self.url!r}: expected file:/path/to/the.log")
        if self.scheme in ("syslog+udp", "syslog+tcp") and not self.host:
            raise SinkError(f"log sink {self.url!r}: expected {self.scheme}://HOST[:PORT]")

    def _selection(self, defaults: Selection) -> Selection:
        levels = {severity.name.lower(): severity for severity in Severity}
        facilities = {facility.name.lower(): facility for facility in Facility}
        chosen = frozenset(
            self._one_of("facility", name.lower(), facilities)
            for name in self.options.get("facility", ",".join(facilities)).split(",")
        )
        return Selection(
            level=self._word("level", levels, defaults.level),
            facilities=chosen,
            timestamps=self._word("timestamps", BOOLEANS, defaults.timestamps),
            fields=self._word("fields", BOOLEANS, defaults.fields),
            syslog_facility=self._word("syslog_facility", SYSLOG_FACILITIES, defaults.syslog_facility),
            application=self._application(defaults.application),
        )

    def _application(self, default: str) -> str:
        name = self.options.get("application", default)
        if not re.fullmatch(r"[!-~]{1,48}", name):  # RFC 5424, 6: APP-NAME
            raise SinkError(f"log sink {self.url!r}: application {name!r}: expected 1 to 48 printable ASCII characters")
        return name

    def _word(self, option: str, allowed: dict[str, T], default: T) -> T:
        value = self.options.get(option)
        return default if value is None else self._one_of(option, value.lower(), allowed)

    def _one_of(self, option: str, value: str, allowed: dict[str, T]) -> T:
        if value not in allowed:
            raise SinkError(f"log sink {self.url!r}: {option} {value!r}: allowed are {', '.join(allowed)}")
        return allowed[value]

    def _size(self, option: str, default: int = 0) -> int:
        value = self.options.get(option)
        if value is None:
            return default
        match = re.fullmatch(r"(\d{1,12})([kmg]?)", value.lower())
        if match is None:
            raise SinkError(f"log sink {self.url!r}: {option} {value!r}: expected a number such as 86400 or 100M")
        return int(match[1]) * UNITS[match[2]]

    def check(self) -> None:
        """Raises SinkError for a file that can't be written."""
        if self.scheme == "file":
            try:
                Path(self.path).open("a").close()
            except OSError as error:
                raise self._not_writable(error) from None

    def _not_writable(self, error: OSError) -> SinkError:
        return SinkError(f"log sink {self.url!r}: {error.strerror}: choose a path that can be written")

    def open(self) -> "Sink":
        """The sink. Raises SinkError for a file that can't be opened; other targets may come up later."""
        from logging_shm.sinks.file import FileSink
        from logging_shm.sinks.journald import JournaldSink
        from logging_shm.sinks.stream import StreamSink
        from logging_shm.sinks.syslog import SyslogSink, SyslogTcpSink

        match self.scheme:
            case "stdout":
                return StreamSink(kind=self.kind, selection=self.selection)
            case "file":
                try:
                    return FileSink(self.path, self.kind, self.selection, self.rotate_bytes, self.rotate_s, self.keep)
                except OSError as error:
                    raise SinkError(
                        f"log sink {self.url!r}: {error.strerror}: choose a path that can be written"
                    ) from None
            case "syslog+udp":
                return SyslogSink((self.host or "", self.port or SYSLOG_PORT), self.selection)
            case "syslog+tcp":
                return SyslogTcpSink((self.host or "", self.port or SYSLOG_TCP_PORT), self.selection)
            case "syslog+unix":
                return SyslogSink(self.path or DEV_LOG, self.selection)
            case _:
                return JournaldSink(self.path or JOURNAL_SOCKET, self.selection)
