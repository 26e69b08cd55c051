"""The hand-over: a former supervisor's workers are replaced one by one, and no datagram is lost by it.

Owned by the supervisor's thread. A predecessor relays until its successor is up and has sockets and rules. Then it is
released: it ends after the pass that it is in, the frames after that wait in the ring, and the successor goes on
with the first of them.
"""

import selectors
from collections.abc import Callable

from logging_shm import Logger
from relay.supervisor.fleet import Fleet
from relay.supervisor.orphans import Orphans, Predecessor
from relay.supervisor.timers import Timers
from relay.supervisor.worker import Worker
from relay.wording import counted

RELEASE_S_MAX = 1.0  # a pass takes milliseconds; an idle worker looks up ten times a second


class Handover:
    """From a start over orphans until the last of them is gone."""

    def __init__(
        self,
        orphans: Orphans,
        fleet: Fleet,
        log: Logger,
        selector: selectors.BaseSelector,
        timers: Timers,
        done: Callable[[], None],
    ) -> None:
        self._orphans = orphans
        self._fleet = fleet
        self._log = log
        self._selector = selector
        self._timers = timers
        self._done = done
        self._is_over = False
        for worker in fleet.workers:
            if worker.predecessor is not None:
                self._watch(worker, worker.predecessor)

    def _watch(self, worker: Worker, predecessor: Predecessor) -> None:
        self._selector.register(predecessor, selectors.EVENT_READ, lambda: self._on_end(worker, predecessor))

    def begin(self, worker: Worker) -> None:
        """The successor has sockets and rules: release its predecessor."""
        predecessor = worker.predecessor
        if predecessor is None:
            self._end_if_over()  # there may have been none at all
            return
        predecessor.release()
        self._timers.after(RELEASE_S_MAX, lambda: self._insist(worker, predecessor))

    def _insist(self, worker: Worker, predecessor: Predecessor) -> None:
        if worker.predecessor is predecessor:
            self._log.error("A former worker did not end in time, killed", pid=predecessor.pid)
            predecessor.kill()

    def _on_end(self, worker: Worker, predecessor: Predecessor) -> None:
        self._selector.unregister(predecessor)
        self._fleet.inherit_rings(worker)
        self._end_if_over()

    def _end_if_over(self) -> None:
        if self._is_over or any(other.predecessor is not None for other in self._fleet.workers):
            return
        self._is_over = True
        count, former = len(self._orphans.predecessors), self._orphans.inventory.supervisor
        self._done()
        self._log.notice(f"Took over from supervisor {former}: {counted(count, 'worker')} replaced")
