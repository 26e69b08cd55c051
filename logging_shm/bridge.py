"""The standard library's `logging` into a ring: a handler for programs that log as everybody does.

    logging.getLogger().addHandler(RingHandler("orders"))

Each process writes a ring of its own, `mcr_{name}_{pid}`, made at its first record: also after a fork, and in a process
that got the handler pickled. `Drain(sinks, follow="mcr_orders_")` finds and reads them all.
"""

import logging
import os
from typing import Any

from logging_shm.facility import Facility, Severity
from logging_shm.ring import SharedSPSCRingBuffer

CAPACITY = 4096


def severity_of(level: int) -> Severity:
    """The severity of a level of `logging`: levels between the named ones count as the lower."""
    for least, severity in (
        (logging.CRITICAL, Severity.Critical),
        (logging.ERROR, Severity.Error),
        (logging.WARNING, Severity.Warning),
        (logging.INFO, Severity.Info),
    ):
        if level >= least:
            return severity
    return Severity.Debug


class RingHandler(logging.Handler):
    """Writes each record's formatted message, and its logger's name as the pair `logger`."""

    def __init__(self, name: str, capacity: int = CAPACITY, level: int = logging.NOTSET) -> None:
        super().__init__(level)
        self._prefix = name
        self._capacity = capacity
        self._ring: SharedSPSCRingBuffer | None = None
        self._pid = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; a full ring drops and counts it."""
        try:
            if self._pid != os.getpid():
                self._open()
            assert self._ring is not None
            self._ring.append(severity_of(record.levelno), self.format(record), (("logger", record.name),))
        except Exception:
            self.handleError(record)

    def _open(self) -> None:
        self._pid = os.getpid()
        name = f"mcr_{self._prefix}_{self._pid}"
        self._ring = SharedSPSCRingBuffer.create(name, self._capacity, Facility.Test)

    def close(self) -> None:
        """Unlink this process's ring, unless it holds records that a drain has yet to read."""
        if self._ring is not None and self._pid == os.getpid() and not self._ring.unread():
            self._ring.shutdown()
        self._ring, self._pid = None, 0
        super().close()

    def __getstate__(self) -> dict[str, Any]:
        return {"prefix": self._prefix, "capacity": self._capacity, "level": self.level, "formatter": self.formatter}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["prefix"], state["capacity"], state["level"])  # type: ignore[misc]
        self.setFormatter(state["formatter"])
