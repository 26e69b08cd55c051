"""The interface watch: has the data path follow the host's interfaces, and tries again what the kernel refused.

Owned by the supervisor's thread. Changes come by netlink (interfaces.py). Not every obstacle that goes away is
announced: what could not be opened or joined is tried once more after a second, then ever more seldom.
"""

import contextlib
import selectors
import time

from logging_shm import Logger
from relay.supervisor import interfaces
from relay.supervisor.changes import Change, Changes
from relay.supervisor.fleet import Fleet
from relay.supervisor.rulebook import RuleBook

RETRY_S_MIN = 1.0
RETRY_S_MAX = 64.0


class InterfaceWatch(contextlib.AbstractContextManager["InterfaceWatch"]):
    """The interfaces as they are, and the socket that tells when they change."""

    def __init__(self, log: Logger, selector: selectors.BaseSelector, fleet: Fleet) -> None:
        self._monitor = interfaces.InterfaceMonitor()  # before the snapshot, so that no change falls between the two
        self.interfaces = interfaces.snapshot()
        self._log = log
        self._fleet = fleet
        self._queue: tuple[Changes, RuleBook] | None = None
        self._without_carrier: set[str] = set()
        self._retry_s, self._retry_at_s = RETRY_S_MIN, 0.0
        selector.register(self._monitor, selectors.EVENT_READ, self._on_change)

    def follow(self, changes: Changes, book: RuleBook) -> None:
        """From now on changes are queued, for the rules that there are at their turn."""
        self._queue = changes, book

    def _on_change(self) -> None:
        self._monitor.discard()
        former, self.interfaces = self.interfaces, interfaces.snapshot()
        anew = sorted(self._fleet.rings.created_anew() & self.interfaces.keys())
        has_lapsed = self._fleet.has_lapsed_joins()
        if former == self.interfaces and not anew and not has_lapsed:
            return
        for line in interfaces.differences(former, self.interfaces, self._without_carrier):
            self._log.notice(line)
        for name in anew:
            if name in former and former[name].index == self.interfaces[name].index:
                self._log.notice(f"Interface {name} was created anew")
        if anew or has_lapsed or interfaces.without_carriers(former) != interfaces.without_carriers(self.interfaces):
            self._go_over()

    def _go_over(self) -> None:
        """Go over to what the rules need of the interfaces as they are now."""
        if self._queue is None:
            return
        changes, book = self._queue

        def begin() -> list[str]:
            return self._fleet.begin(tuple(book.rules.values()), self.interfaces, strict=False)

        changes.add(Change(begin, self._end, self._refuse))

    def _end(self, warnings: list[str]) -> None:
        for warning in warnings:
            self._log.warning(warning)

    def _refuse(self, error: str) -> None:
        self._log.error(f"Interfaces changed: {error}")

    def retry(self) -> None:
        """Once a second: sockets, rings and joins that were refused, if it is time."""
        if not self._fleet.is_incomplete:
            self._retry_s, self._retry_at_s = RETRY_S_MIN, 0.0
        elif self._queue is not None and time.monotonic() >= self._retry_at_s and not self._queue[0].is_full:
            self._retry_at_s = time.monotonic() + self._retry_s
            self._retry_s = min(2 * self._retry_s, RETRY_S_MAX)
            self._go_over()

    def __exit__(self, *_: object) -> None:
        self._monitor.close()
