"""The supervisor's log: the thread that drains every ring of this relay into the sinks.

The compiled reader takes half a second to load; a thread does that while the supervisor starts everything else.
What is written meanwhile waits in the rings.
"""

import contextlib
import struct
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from logging_shm import Logger, SharedSPSCRingBuffer
from logging_shm.sinks.selection import SinkError
from logging_shm.sinks.url import Described
from relay.supervisor.segments import Stale

if TYPE_CHECKING:
    from logging_shm import Drain


class LogDrain:
    """Loads, runs, and at the end stops the drain."""

    def __init__(
        self, sinks: Sequence[Described], rings: Sequence[SharedSPSCRingBuffer], stale: Stale, log: Logger
    ) -> None:
        self._described = sinks
        self._log = log
        self._rings = rings
        self._stale = stale
        self._wake = threading.Condition()
        self._reopen = self._stop = self._stale_ended = False
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)

    def start(self) -> None:
        """Begin to load, then to drain."""
        self._thread.start()

    def reopen(self) -> None:
        """Have the sinks open their files anew."""
        with self._wake:
            self._reopen = True
            self._wake.notify()

    def stale_ended(self) -> None:
        """Nobody writes to the stale rings any more: read them out and let go of them."""
        with self._wake:
            self._stale_ended = True
            self._wake.notify()

    def stop(self) -> None:
        """Hand on what the rings hold, then end."""
        with self._wake:
            self._stop = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        from logging_shm import Drain
        from logging_shm.truncation import survive_truncation

        survive_truncation()  # of the whole process
        sinks = []
        for described in self._described:
            try:
                sinks.append(described.open())
            except SinkError as error:
                self._log.error(str(error))
        drain = Drain(sinks)
        drain.start()
        drain.add(self._stale.rings)
        if self._stale_ended:
            self._release_stale(drain)
        drain.add(self._rings)
        while self._wait(drain):
            pass
        drain.stop()

    def _wait(self, drain: "Drain") -> bool:
        """Wait until something is asked for, and do it; False to stop."""
        with self._wake:
            self._wake.wait_for(lambda: self._stop or self._reopen or self._stale_ended)
            reopen, ended, stop = self._reopen, self._stale_ended, self._stop
            self._reopen = self._stale_ended = False
        if reopen:
            drain.reopen()
        if ended:
            self._release_stale(drain)
        return not stop

    def _release_stale(self, drain: "Drain") -> None:
        for ring in self._stale.rings:
            with contextlib.suppress(struct.error):  # cursors or counts that can't be: there is no end to put right
                ring.segment.finish_dead()
        drain.remove(self._stale.rings)
        self._stale.rings = []


def last_words(rings: Iterable[SharedSPSCRingBuffer]) -> str | None:
    """The last record that a process wrote, of all its rings, whether it was read already or not."""
    from logging_shm import Reader

    reader = Reader(consume=False)
    reader.add(rings, 1)
    batch = reader.read(everything=True)
    return reader.entry(batch, len(batch.records) - 1).message if len(batch.records) else None
