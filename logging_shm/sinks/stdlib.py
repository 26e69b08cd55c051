"""Python's `logging`: drained records handed to a logger of the standard library, with its handlers and filters."""

import logging
from collections.abc import Mapping
from typing import Any

import msgspec

from logging_shm.bridge import LEVELS
from logging_shm.facility import Severity
from logging_shm.sinks.base import Chunk, Sink, messages, wall_clock
from logging_shm.sinks.selection import Selection

OWN_FIELDS = ("facility", "severity", "core", "sequence", "pairs", "timestamp_ns")


class StdlibSink(Sink):
    """Each record becomes a LogRecord with `facility`, `severity`, `core`, `sequence` and `pairs` besides.

    Its time, process and thread are those of whoever wrote it. Pickled, or after a fork, it is a new sink of the same
    logger, not started. A RingHandler leaves these records alone: they came from a ring.
    """

    def __init__(self, logger: logging.Logger, selection: Selection | None = None) -> None:
        super().__init__(f"logging {logger.name}", "json", selection)
        self._logger = logger
        self._selection = selection

    def __reduce__(self) -> tuple[Any, ...]:
        return StdlibSink, (self._logger, self._selection)

    def deliver(self, chunk: Chunk) -> None:
        """Hand each message to the logger, which filters by its own level. A handler that raises loses the message."""
        for message in messages(chunk, self.done):
            if self.ended:
                break
            try:
                self._hand_on(msgspec.json.decode(message))
            except Exception as error:  # of a handler or filter, which may be anybody's
                self.refuse(f"{type(error).__name__}: {error}")
            else:
                self.advance(1)

    def _hand_on(self, fields: Mapping[str, Any]) -> None:
        level = LEVELS[Severity[fields["severity"]]]
        if not self._logger.isEnabledFor(level):
            return
        record = self._logger.makeRecord(self._logger.name, level, "", 0, fields["message"], (), None)
        record.__dict__.update({name: fields[name] for name in OWN_FIELDS}, from_ring=True)
        record.process, record.thread = fields["pid"], fields["tid"]
        record.processName = record.threadName = None
        created_s = (fields["timestamp_ns"] + wall_clock.offset_ns()) / 1e9
        record.relativeCreated += (created_s - record.created) * 1000
        record.created, record.msecs = created_s, created_s % 1 * 1000
        self._logger.handle(record)

    def close_target(self) -> None:
        """Leave the logger and its handlers to whoever made them."""
