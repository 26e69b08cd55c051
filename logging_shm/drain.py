"""The drain: one thread that reads every ring, merges records by time, and hands them to the sinks.

Reading and formatting are compiled and release the GIL. A sink that fails or is slow loses lines of its own; the
reading never stops, so rings don't fill because nobody can see them.
"""

import contextlib
import os
import struct
import threading
import time
from collections import deque
from collections.abc import Collection, Iterable, Sequence

from logging_shm.facility import Severity
from logging_shm.levels import LevelPolicy
from logging_shm.lines import Batch
from logging_shm.reader import BATCH_RECORDS, Reader
from logging_shm.ring import SharedSPSCRingBuffer
from logging_shm.segment import SegmentError, identity_of, names, unlink
from logging_shm.sinks.base import Sink

SLEEP_S_MIN = 0.001
SLEEP_S_MAX = 0.010
BUSY_RECORDS = 256  # in a pass: then the next pass follows at once
FOLLOW_INTERVAL_S = 0.5
REPORTS_MAX = 64  # lines of sinks about themselves that wait


class Drain:
    """Reads rings in a thread of its own until `stop`. Rings come and go while it runs.

    With `follow`, rings whose names begin so are found by themselves, if they belong to this user, to root, or to one
    of `owners`; `levels` are put into them. When their owner is gone and they are read to the end, they are unlinked.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        follow: str | None = None,
        owners: Collection[int] = (),
        levels: LevelPolicy | None = None,
    ) -> None:
        self.sinks = tuple(sinks)
        self._follow = follow
        self._owners = {0, os.geteuid(), *owners}
        self._levels = levels
        self._receiving = list(self.sinks)
        # By the segment's identity: a name may be another one's later.
        self._followed: dict[int, SharedSPSCRingBuffer] = {}
        self._finished: set[int] = set()  # of the followed, those whose owner is gone
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
                self._finish_dead()
            self._drain_all()
            self._forget_finished()
        for sink in self.sinks:
            sink.close()

    def _run(self) -> None:
        sleep_s = SLEEP_S_MIN
        follow_s = time.monotonic()
        while not self._stop.is_set():
            if self._follow is not None and time.monotonic() >= follow_s:
                with self._lock:
                    self._forget_finished()
                    self._find(self._follow)
                    self._finish_dead()
                follow_s = time.monotonic() + FOLLOW_INTERVAL_S
            with self._lock:
                count = self._hand_on(self._reader.read())
            if count >= BUSY_RECORDS:
                sleep_s = SLEEP_S_MIN
                continue
            sleep_s = SLEEP_S_MIN if count else min(sleep_s * 2, SLEEP_S_MAX)
            self._stop.wait(sleep_s)

    def _hand_on(self, batch: Batch) -> int:
        """Give a batch to every sink; return the number of its records."""
        with contextlib.suppress(IndexError):
            while self._notices and self._reader.rings:
                self._give(self._reader.say(*self._notices.popleft()))
        if len(batch.records):
            self._give(batch)
        return len(batch.records)

    def _give(self, batch: Batch) -> None:
        for sink in tuple(self._receiving):
            try:
                sink.accept(batch)
            except Exception as error:  # whatever it is: the other sinks and the reading go on
                self._receiving.remove(sink)
                what = f"{type(error).__name__}: {error}"
                self._notices.append((Severity.Error, f"Log sink {sink.name}: {what}: it gets no more lines"))

    def _drain_all(self) -> None:
        """Read until no ring holds anything; a writer that goes on writing is left at what it had then."""
        for _ in range(1 + self._reader.lag() // BATCH_RECORDS + len(self._reader.rings)):
            if not self._hand_on(self._reader.read(everything=True)):
                break

    # --- rings found by name ------------------------------------------------------------------------

    def _find(self, prefix: str) -> None:
        """Read the rings of that prefix that are not read yet."""
        found = {}
        for name in names():
            if name.startswith(prefix) and identity_of(name) not in self._followed:
                with contextlib.suppress(SegmentError):
                    ring = SharedSPSCRingBuffer.attach(name, self._owners)
                    found[ring.segment.identity] = ring
        if found:
            if self._levels is not None:
                self._levels.apply(found.values())
            self._reader.add(found.values())
            self._followed |= found

    def _finish_dead(self) -> None:
        """Put the ends of rings in order whose owner is gone, before they are read for the last time."""
        for identity, ring in self._followed.items():
            if identity not in self._finished and not ring.segment.is_owned():
                self._finished.add(identity)
                with contextlib.suppress(struct.error):  # cursors or counts that can't be: there is no end to put right
                    ring.segment.finish_dead()

    def _forget_finished(self) -> None:
        """Forget and unlink rings whose owner is gone once they are read to the end."""
        read = {identity: self._followed[identity] for identity in self._finished}
        read = {identity: ring for identity, ring in read.items() if not ring.unread()}
        if not read:
            return
        self._hand_on(self._reader.read(everything=True))  # with losses that are told now and then only
        self._reader.remove(read.values())
        for identity, ring in read.items():
            del self._followed[identity]
            self._finished.remove(identity)
            if identity_of(ring.segment.name) == identity:
                unlink(ring.segment.name)
