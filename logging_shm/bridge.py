"""The standard library's `logging` into a ring: a handler for programs that log as everybody does.

    logging.getLogger().addHandler(RingHandler("orders"))

Each process writes a ring of its own, `mcr_{name}_{pid}`, made at its first record: also after a fork, and in a process
that got the handler pickled. `Drain(sinks, follow="mcr_orders_")` finds and reads them all.

`logging` has five levels where RFC 5424 has eight severities; NOTICE, ALERT and EMERGENCY get numbers between and
above, so that nothing is lost either way.
"""

import logging
import os
import threading
from typing import Any

from logging_shm.facility import Facility, Severity
from logging_shm.ring import SharedSPSCRingBuffer
from logging_shm.segment import NAME

CAPACITY = 4096
NOTICE = 25
ALERT = 60
EMERGENCY = 70
LEVELS = {
    Severity.Emergency: EMERGENCY,
    Severity.Alert: ALERT,
    Severity.Critical: logging.CRITICAL,
    Severity.Error: logging.ERROR,
    Severity.Warning: logging.WARNING,
    Severity.Notice: NOTICE,
    Severity.Info: logging.INFO,
    Severity.Debug: logging.DEBUG,
}
for _level, _name in ((NOTICE, "NOTICE"), (ALERT, "ALERT"), (EMERGENCY, "EMERGENCY")):
    logging.addLevelName(_level, _name)


def severity_of(level: int) -> Severity:
    """The severity of a level of `logging`: levels between the named ones count as the lower."""
    for severity, least in LEVELS.items():
        if level >= least:
            return severity
    return Severity.Debug


class _Rings:
    """This process's rings by name: handlers of one name share one, as a ring has one writer."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, tuple[SharedSPSCRingBuffer, int]] = {}

    def take(self, name: str, capacity: int) -> SharedSPSCRingBuffer:
        """The ring, made where it is not there yet. Raises SegmentError."""
        with self._lock:
            if name in self._open:
                ring, users = self._open[name]
            else:
                ring, users = SharedSPSCRingBuffer.create(name, capacity, Facility.Test), 0
            self._open[name] = ring, users + 1
            return ring

    def give_back(self, name: str) -> None:
        """Unlink what no handler uses any more, unless it holds records that a drain has yet to read."""
        with self._lock:
            ring, users = self._open[name]
            self._open[name] = ring, users - 1
            if users == 1 and not ring.unread():
                ring.shutdown()
                del self._open[name]


_rings = _Rings()


def _forget_parents_rings() -> None:
    global _rings  # noqa: PLW0603 - after a fork, another thread's lock and the parent's rings are none of ours
    _rings = _Rings()


os.register_at_fork(after_in_child=_forget_parents_rings)


class RingHandler(logging.Handler):
    """Writes each record's formatted message, and its logger's name as the pair `logger`."""

    def __init__(self, name: str, capacity: int = CAPACITY, level: int | str = logging.NOTSET) -> None:
        """Raises ValueError for a name or capacity that no ring can have."""
        super().__init__(level)
        if not (name and NAME.fullmatch(f"mcr_{name}_{os.getpid()}")):
            raise ValueError(f"ring name {name!r}: expected up to 190 letters, digits, _ . -")
        if capacity < 1 or capacity & (capacity - 1):
            raise ValueError(f"capacity {capacity}: expected a power of two")
        self._prefix = name
        self._capacity = capacity
        self._ring: SharedSPSCRingBuffer | None = None
        self._pid = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; a full ring drops and counts it. One that a StdlibSink took from a ring is left alone."""
        if getattr(record, "from_ring", False):
            return
        try:
            ring = self._own_ring()
            ring.append(severity_of(record.levelno), self.format(record), (("logger", record.name),))
        except Exception:
            self.handleError(record)

    def _own_ring(self) -> SharedSPSCRingBuffer:
        if self._ring is None or self._pid != os.getpid():
            self._ring = _rings.take(self._segment_name(), self._capacity)
            self._pid = os.getpid()
        return self._ring

    def _segment_name(self) -> str:
        return f"mcr_{self._prefix}_{os.getpid()}"

    def close(self) -> None:
        """Unlink this process's ring, unless it holds records that a drain has yet to read, or is another's too."""
        with self.lock or threading.RLock():
            if self._ring is not None and self._pid == os.getpid():
                _rings.give_back(self._segment_name())
            self._ring, self._pid = None, 0
        super().close()

    def __getstate__(self) -> dict[str, Any]:
        own = {"lock", "_ring", "_pid"}
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        logging.Handler.__init__(self)
        self.__dict__.update(state)
        self._ring, self._pid = None, 0
