"""systemd's journal, by its native protocol: https://systemd.io/JOURNAL_NATIVE_PROTOCOL/.

`journalctl MCR_FACILITY=Ingress MCR_RULE=tv PRIORITY=4`.
"""

import socket

from logging_shm.sinks.datagrams import DatagramSink
from logging_shm.sinks.selection import Selection

SOCKET = "/run/systemd/journal/socket"


class JournaldSink(DatagramSink):
    """Sends each record as a journal entry, its pairs as fields `MCR_KEY=`."""

    def __init__(self, path: str = SOCKET, selection: Selection | None = None) -> None:
        super().__init__(f"journald {path}", "journal", selection, socket.AF_UNIX, path)
