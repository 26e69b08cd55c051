"""The last lines of an instance's log, read from its rings beside the drain, which loses nothing by it.

Only the newest records are looked at: when more come than can be shown, the rest is passed over.
"""

from collections import deque

from logging_shm import SegmentError, SharedSPSCRingBuffer
from logging_shm.facility import Facility, Severity, segment_name
from logging_shm.reader import BATCH_RECORDS, Reader
from logging_shm.segment import identity_of
from logging_shm.sinks.base import Formatter, messages
from logging_shm.sinks.selection import Selection
from logging_shm.truncation import survive_truncation
from relay.supervisor.segments import STATS, names_of

LINES_MAX = 200
LAST_RECORDS = 64  # of each ring, to begin with


class LogTail:
    """The last lines of an instance's log."""

    def __init__(self, instance: str | None) -> None:
        survive_truncation()  # whoever owns a segment may cut it short, the counters' too
        self._instance = instance
        self._known: dict[str, SharedSPSCRingBuffer] = {}
        self._reader = Reader(consume=False)
        self._formatter = Formatter("text", Selection(level=Severity.Debug, timestamps=True))
        self._lines: deque[str] = deque(maxlen=LINES_MAX)

    def read(self) -> tuple[str, ...]:
        """Look for rings that came or went, and for new records; return the last lines, the newest last."""
        self._take()  # also of rings that are gone since: their last words
        self._renew()
        if self._reader.lag() > BATCH_RECORDS:
            rings = list(self._known.values())
            self._reader.remove(rings)
            self._reader.add(rings, LAST_RECORDS)
        self._take()
        return tuple(self._lines)

    def supervisor_runs(self) -> bool:
        """Whether the process that drains the log runs; workers may go on without it."""
        name = segment_name(Facility.Supervisor, instance=self._instance)
        ring = self._known.get(name)
        if ring is None:  # it may be there and not ours to read
            return identity_of(name) is not None
        return ring.segment.writer_is_running()

    def _renew(self) -> None:
        names = {name for name in names_of(self._instance) if not name.endswith(STATS)}
        for name, ring in list(self._known.items()):
            if name not in names or identity_of(name) != ring.segment.identity:
                self._reader.remove([ring])
                del self._known[name]
        for name in names - self._known.keys():
            try:
                ring = SharedSPSCRingBuffer.attach(name)
            except SegmentError:  # it is being made, it goes, or it is another's: what can be read is shown
                continue
            self._reader.add([ring], LAST_RECORDS)
            self._known[name] = ring

    def _take(self) -> None:
        batch = self._reader.read(everything=True)
        for chunk in self._formatter.chunks(batch):
            self._lines.extend(message.decode().rstrip("\n") for message in messages(chunk))
