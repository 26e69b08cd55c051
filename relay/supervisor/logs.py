"""The supervisor's log: the thread that drains every ring of this relay into the sinks.

The compiled reader takes half a second to load; a thread does that while the supervisor starts everything else.
What is written meanwhile waits in the rings.
"""

import threading
from collections.abc import Sequence

from logging_shm import Logger, SharedSPSCRingBuffer
from logging_shm.sinks.selection import SinkError
from logging_shm.sinks.url import Described
from relay.supervisor.segments import Stale


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
        self._reopen = self._stop = False
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)

    def start(self) -> None:
        """Begin to load, then to drain."""
        self._thread.start()

    def reopen(self) -> None:
        """Have the sinks open their files anew."""
        with self._wake:
            self._reopen = True
            self._wake.notify()

    def stop(self) -> None:
        """Hand on what the rings hold, then end."""
        with self._wake:
            self._stop = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        from logging_shm import Drain

        sinks = []
        for described in self._described:
            try:
                sinks.append(described.open())
            except SinkError as error:
                self._log.error(str(error))
        drain = Drain(sinks)
        drain.start()
        drain.add(self._stale.rings)
        drain.remove(self._stale.rings)
        drain.add(self._rings)
        while self._wait():
            drain.reopen()
        drain.stop()

    def _wait(self) -> bool:
        """Wait until something is asked for: True to reopen, False to stop."""
        with self._wake:
            self._wake.wait_for(lambda: self._stop or self._reopen)
            self._reopen = False
            return not self._stop
