"""systemd's journal, by its native protocol: https://systemd.io/JOURNAL_NATIVE_PROTOCOL/.

`journalctl MCR_FACILITY=Ingress MCR_RULE=tv PRIORITY=4`.
"""

from logging_shm.sinks.datagrams import DatagramSink
from logging_shm.sinks.selection import JOURNAL_SOCKET, Selection


class JournaldSink(DatagramSink):
    """Sends each record as a journal entry, its pairs as fields `MCR_KEY=`."""

    def __init__(self, path: str = JOURNAL_SOCKET, selection: Selection | None = None) -> None:
        super().__init__(f"journald {path}", "journal", selection, path)
