"""What `tail` and `dump` share: records of chosen rings as lines, filtered, without taking any from the drain."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from logging_shm.facility import Severity
from logging_shm.layout import RECORD
from logging_shm.lines import Batch
from logging_shm.reader import BATCH_RECORDS, Reader
from logging_shm.ring import SharedSPSCRingBuffer
from logging_shm.sinks.base import Formatter, messages
from logging_shm.sinks.selection import Selection
from logging_shm.truncation import survive_truncation

_TIMESTAMP = RECORD["timestamp_ns"]


@dataclass(frozen=True)
class Filter:
    """Which records are shown, and how."""

    severity: Severity = Severity.Debug
    grep: re.Pattern[str] | None = None
    since_ns: int | None = None
    as_json: bool = False


class Follower:
    """Reads rings from their last records on, beside whoever drains them."""

    def __init__(self, rings: Iterable[SharedSPSCRingBuffer], wanted: Filter, last: int) -> None:
        """`last` records of each ring are looked at, at most."""
        survive_truncation()
        self._wanted = wanted
        self.reader = Reader(consume=False)
        self.reader.add(rings, last)
        selection = Selection(level=wanted.severity, timestamps=True, fields=True)
        self._formatter = Formatter("json" if wanted.as_json else "text", selection)

    def lines(self, everything: bool) -> Iterator[str]:
        """The next batch's lines; none when nothing was written."""
        batch = self.reader.read(everything)
        if self._wanted.since_ns is not None and len(batch.records):
            stamps = batch.records[:, _TIMESTAMP : _TIMESTAMP + 8].copy().view(np.int64)[:, 0]
            batch = select(batch, stamps >= self._wanted.since_ns)
        for chunk in self._formatter.chunks(batch):
            for message in messages(chunk):
                line = message.decode()
                if self._wanted.grep is None or self._wanted.grep.search(line):
                    yield line

    def present(self) -> Iterator[str]:
        """Everything that is there now."""
        for _ in range(1 + len(self.reader.rings) + self.reader.lag() // BATCH_RECORDS):
            yield from self.lines(everything=True)
            if not self.reader.lag():
                return


def select(batch: Batch, chosen: Sequence[bool]) -> Batch:
    """The chosen records of a batch."""
    return batch._replace(records=batch.records[chosen], origins=batch.origins[chosen])
