"""The drain: one thread that reads every ring, merges records by time, and hands them to the sinks.

Reading and formatting are compiled and release the GIL. A sink that fails or is slow loses lines of its own; the
reading never stops, so rings don't fill because nobody can see them.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Iterable, Sequence

from logging_shm.facility import Severity
from logging_shm.lines import Batch
from logging_shm.reader import BATCH_RECORDS, Reader
from logging_shm.ring import SharedSPSCRingBuffer
from logging_shm.segment import SegmentError, names, unlink
from logging_shm.sinks.base import Sink

SLEEP_S_MIN = 0.001
SLEEP_S_MAX = 0.010
BUSY_RECORDS = 256  # in a pass: then the next pass follows at once
FOLLOW_INTERVAL_S = 0.5
REPORTS_MAX = 64  # lines of sinks about themselves that wait


class Drain:
    """Reads rings in a thread of its own until `stop`. Rings come and go while it runs.

    With `follow`, rings whose names begin so are found by themselves; when their owner is gone and they are read
    to the end, they are unlinked.
    """

    def __init__(self, sinks: Sequence[Sink], follow: str | None = None) -> None:
        self.sinks = tuple(sinks)
        self._follow = follow
        self._followed: dict[str, SharedSPSCRingBuffer] = {}
        self._reader = Reader()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._notices: deque[tuple[Severity, str]] = deque(maxlen=REPORTS_MAX)
        self._thread = threading.Thread(target=self._run, name="log-drain", daemon=True)

    def start(self) -> None:
        """Begin to read."""
        for sink in self.sinks:
            sink.start(lambda severity, message: self._notices.append((severity, message)))
        self._thread.start()

    def add(self, rings: Iterable[SharedSPSCRingBuffer]) -> None:
        """Read these, too."""
        with self._lock:
            self._reader.add(rings)

    def remove(self, rings: Iterable[SharedSPSCRingBuffer]) -> None:
        """Hand on what these still hold, then forget them."""
        with self._lock:
            self._drain_all()
            self._reader.remove(rings)

    def reopen(self) -> None:
        """Have every sink open its target anew, as after a file was moved away."""
        for sink in self.sinks:
            sink.reopen()

    def stop(self) -> None:
        """Hand on everything that is left, then end the thread and the sinks."""
        self._stop.set()
        self._thread.join()
        with self._lock:
            if self._follow is not None:
                self._find(self._follow)
            self._drain_all()
            self._forget_finished()
        for sink in self.sinks:
            sink.close()

    def _run(self) -> None:
        sleep_s = SLEEP_S_MIN
        until_follow_s = 0.0
        while not self._stop.is_set():
            if self._follow is not None and until_follow_s <= 0:
                until_follow_s = FOLLOW_INTERVAL_S
                with self._lock:
                    self._find(self._follow)
                    self._forget_finished()
            with self._lock:
                count = self._hand_on(self._reader.read())
            if count >= BUSY_RECORDS:
                sleep_s = SLEEP_S_MIN
                continue
            sleep_s = SLEEP_S_MIN if count else min(sleep_s * 2, SLEEP_S_MAX)
            until_follow_s -= sleep_s
            self._stop.wait(sleep_s)

    def _hand_on(self, batch: Batch) -> int:
        """Give a batch to every sink; return the number of its records."""
        with contextlib.suppress(IndexError):
            while self._notices and self._reader.rings:
                notice = self._reader.say(*self._notices.popleft())
                for sink in self.sinks:
                    sink.accept(notice)
        if len(batch.records):
            for sink in self.sinks:
                sink.accept(batch)
        return len(batch.records)

    def _drain_all(self) -> None:
        """Read until no ring holds anything; a writer that goes on writing is left at what it had then."""
        for _ in range(1 + self._reader.lag() // BATCH_RECORDS + len(self._reader.rings)):
            if not self._hand_on(self._reader.read(everything=True)):
                break

    # --- rings found by name ------------------------------------------------------------------------

    def _find(self, prefix: str) -> None:
        found = {}
        for name in names():
            if name.startswith(prefix) and name not in self._followed:
                with contextlib.suppress(SegmentError):
                    found[name] = SharedSPSCRingBuffer.attach(name)
        for ring in found.values():
            if not ring.segment.is_owned():
                ring.segment.finish_dead()
        self._reader.add(found.values())
        self._followed |= found

    def _forget_finished(self) -> None:
        for name, ring in list(self._followed.items()):
            if ring.segment.is_owned() or ring.unread():
                continue
            self._reader.remove([ring])
            del self._followed[name]
            unlink(name)
