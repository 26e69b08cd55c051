"""Relief: a worker that keeps dying gives its share of the traffic to the others, until it has recovered.

Owned by the supervisor's thread. The nursery says who died and who lives; here is decided what that means for the
traffic, and it is told.
"""

import time

from logging_shm import Logger
from relay.errors import RelayError
from relay.supervisor.fleet import Fleet
from relay.supervisor.worker import Worker


class Relief:
    """Who gets no traffic, and who should get none but has nobody to relieve it."""

    def __init__(self, fleet: Fleet, log: Logger) -> None:
        self._fleet = fleet
        self._log = log
        self._unrelieved: set[int] = set()  # cores

    def exclude(self, worker: Worker) -> None:
        """Say that a worker keeps dying, and give its share of the traffic to others."""
        lost = self._fleet.rings.exclude(worker)
        whose = f"The worker of core {worker.core} has died {worker.lives.young_deaths} times at once"
        if lost is None:
            self._unrelieved.add(worker.core)
            self._log.alert(f"{whose}: there is no other, its traffic is lost when its ring is full", core=worker.core)
        else:
            self._unrelieved.discard(worker.core)
            self._log.alert(f"{whose}: others get its traffic, {lost} frames in its rings are lost", core=worker.core)

    def absolve(self, worker: Worker) -> None:
        """A worker stays alive: it gets its traffic again, or has had it long enough to have recovered."""
        if worker.is_excluded:
            self._readmit(worker)
            return
        if worker.lives.is_hopeless:
            worker.lives.recovered()
        if worker.core in self._unrelieved:
            self._unrelieved.discard(worker.core)
            self._log.notice(f"The worker of core {worker.core} has recovered: it stays alive", core=worker.core)

    def _readmit(self, worker: Worker) -> None:
        worker.started_s = time.monotonic()
        try:
            self._fleet.rings.readmit(worker)
        except RelayError as error:
            self._log.error(str(error), core=worker.core)
            return
        self._log.notice(f"The worker of core {worker.core} has recovered and gets its traffic again", core=worker.core)
