"""Python's `logging`: drained records handed to a logger of the standard library, with its handlers and filters."""

import logging
from collections.abc import Mapping
from typing import Any

import msgspec

from logging_shm.facility import Severity
from logging_shm.sinks.base import Chunk, Sink, messages
from logging_shm.sinks.selection import Selection

LEVELS = {
    Severity.Emergency: logging.CRITICAL,
    Severity.Alert: logging.CRITICAL,
    Severity.Critical: logging.CRITICAL,
    Severity.Error: logging.ERROR,
    Severity.Warning: logging.WARNING,
    Severity.Notice: logging.INFO,
    Severity.Info: logging.INFO,
    Severity.Debug: logging.DEBUG,
}


class StdlibSink(Sink):
    """Each record becomes a LogRecord with `facility`, `severity`, `core`, `sequence` and `pairs` besides."""

    def __init__(self, logger: logging.Logger, selection: Selection | None = None) -> None:
        super().__init__(f"logging {logger.name}", "json", selection)
        self._logger = logger

    def deliver(self, chunk: Chunk) -> int:
        """Hand each message to the logger, which filters by its own level."""
        for message in messages(chunk):
            fields: Mapping[str, Any] = msgspec.json.decode(message)
            level = LEVELS[Severity[fields["severity"]]]
            if not self._logger.isEnabledFor(level):
                continue
            record = self._logger.makeRecord(self._logger.name, level, "", 0, fields["message"], (), None)
            for name in ("facility", "severity", "core", "sequence", "pairs", "timestamp_ns"):
                setattr(record, name, fields[name])
            record.process, record.thread = fields["pid"], fields["tid"]
            self._logger.handle(record)
        return len(chunk.ends)

    def close_target(self) -> None:
        """Leave the logger and its handlers to whoever made them."""
