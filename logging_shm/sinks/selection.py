"""What a sink wants of the log, and the words for it. Imports nothing that is compiled."""

import socket
from dataclasses import dataclass, field

from logging_shm.facility import Facility, Severity

DEV_LOG = "/dev/log"
JOURNAL_SOCKET = "/run/systemd/journal/socket"


class SinkError(Exception):
    """A sink that can't be opened or described so."""


@dataclass(frozen=True)
class Selection:
    """Which records a sink wants, and how text looks."""

    level: Severity = Severity.Debug
    facilities: frozenset[Facility] = frozenset(Facility)
    timestamps: bool = False
    fields: bool = False
    colours: bool = False
    syslog_facility: int = 3  # daemon
    application: str = "mcr"
    host: str = field(default_factory=socket.gethostname)
