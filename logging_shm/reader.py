"""The reader: all rings of a log as one stream of batches, merged by time, with what was lost told in its place.

The drain reads with it and consumes; `mcrlog tail` reads with it and does not, so any number may watch.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from logging_shm.append import printable_table
from logging_shm.collect import SOURCE, collect
from logging_shm.facility import Severity
from logging_shm.layout import FORMATS_MAX, MESSAGE_BYTES_MAX, RECORD_BYTES, STATE_READY
from logging_shm.lines import Batch, Formats
from logging_shm.ring import LogEntry, SharedSPSCRingBuffer, cut

BATCH_RECORDS = 4096  # a megabyte: half a millisecond's work, and a quarter of the greatest ring
REPORTS_MAX = 64  # of losses in one batch
REPORTS_OF_RING_MAX = 4 + FORMATS_MAX
MERGE_DELAY_NS = 2_000_000  # a record that old has been finished, unless its writer was preempted in the middle of it
# Records are written between the reader's look at the clock and its look at the rings: these wait, too.
FUTURE_NS_MAX = 1_000_000_000
CHECK_INTERVAL_NS = 100_000_000  # for losses, while nothing is written
REPORT_INTERVAL_NS = 1_000_000_000  # of a loss that goes on

_RECORD_DTYPE = np.dtype(
    {
        "names": ["state", "severity", "facility", "length", "pairs", "core", "timestamp_ns", "sequence", "message"],
        "formats": ["u1", "u1", "u1", "u1", "u1", "u1", "<i8", "<i8", f"S{MESSAGE_BYTES_MAX}"],
        "offsets": [0, 1, 2, 3, 4, 5, 8, 16, 32],
        "itemsize": RECORD_BYTES,
    }
)


class Report(NamedTuple):
    """A line about the log itself."""

    ring: int
    severity: Severity
    message: str


@dataclass
class Losses:
    """What of a ring was not read, as far as it was told."""

    dropped: list[int]
    suppressed: list[int]
    missed: int = 0
    damaged: int = 0
    unfinished: int = 0
    since_ns: int = 0  # when dropping began; 0: nothing untold
    untold: list[int] = field(default_factory=lambda: [0] * len(Severity))
    told_ns: int = 0  # when suppression was told last


class Reader:
    """Reads rings. Not for several threads at once."""

    def __init__(self, consume: bool = True, delay_ns: int = MERGE_DELAY_NS) -> None:
        self._consume = consume
        self._delay_ns = delay_ns
        self._printable = printable_table()
        self._checked_ns = time.monotonic_ns()
        self._next_report = 0  # the ring whose losses are told first
        self._arrange([], np.zeros(0, SOURCE), [])

    def _arrange(self, rings: list[SharedSPSCRingBuffer], sources: Any, losses: list[Losses]) -> None:
        self.rings = rings
        self._mappings = [ring.segment.bytes for ring in rings]  # sources hold addresses in these
        self._sources = sources
        self._losses = losses
        self._formats = Formats(max(len(rings), 1))
        self._registered = [-1] * len(rings)

    def add(self, rings: Iterable[SharedSPSCRingBuffer], last: int | None = None) -> None:
        """Read these, too: where their last reader left off, or from the `last` records of each on."""
        rings = list(rings)
        sources = np.zeros(len(rings), SOURCE)
        for source, ring in zip(sources, rings, strict=True):
            source["base"] = ring.segment.bytes.ctypes.data
            source["capacity"] = ring.capacity
            source["cursor"] = source["end"] = self._first(ring, last)
            source["facility"] = ring.facility
            source["overwrite"] = ring.overwrite
            source["consume"] = self._consume
        losses = [self._losses_until_now(ring) for ring in rings]
        self._arrange([*self.rings, *rings], np.concatenate([self._sources, sources]), [*self._losses, *losses])

    @staticmethod
    def _first(ring: SharedSPSCRingBuffer, last: int | None) -> int:
        if last is None:
            return ring.segment.get("read_cursor")
        return max(ring.segment.get("write_cursor") - min(last, ring.capacity), 0)

    def _losses_until_now(self, ring: SharedSPSCRingBuffer) -> Losses:
        """What is not told any more: nothing by whoever consumes, all before now by who only watches."""
        if self._consume:
            return Losses([0] * len(Severity), [0] * FORMATS_MAX)
        return Losses(ring.segment.dropped(), self._suppressed(ring), unfinished=ring.segment.get("unfinished"))

    def remove(self, rings: Iterable[SharedSPSCRingBuffer]) -> None:
        """Forget these."""
        gone = {id(ring) for ring in rings}
        kept = [index for index, ring in enumerate(self.rings) if id(ring) not in gone]
        self._arrange(
            [self.rings[index] for index in kept], self._sources[kept], [self._losses[index] for index in kept]
        )

    def read(self, everything: bool = False) -> Batch:
        """The next batch, which may be empty. With `everything`, also records that are too young to be merged."""
        records = np.empty((BATCH_RECORDS + REPORTS_MAX, RECORD_BYTES), np.uint8)
        origins = np.empty(len(records), np.int32)
        now_ns = time.monotonic_ns()
        count = 0
        if self.rings:
            newest_ns, future_ns = now_ns - self._delay_ns, now_ns + FUTURE_NS_MAX
            if everything:
                newest_ns = future_ns
            count = collect(self._sources, records[:BATCH_RECORDS], origins, newest_ns, future_ns)
            # Not before: a format may be registered just before the first record that has it.
            self._load_formats()
        # What was lost is looked up where something was written, else now and then: idle passes cost next to nothing.
        is_due = count or everything or now_ns - self._checked_ns >= CHECK_INTERVAL_NS
        for report in self._reports(now_ns, everything) if is_due else ():
            records[count] = self._record(report, now_ns)
            origins[count] = report.ring
            count += 1
        return Batch(records[:count], origins[:count], self._formats.steps, self._formats.literals, self._printable)

    def say(self, severity: Severity, message: str) -> Batch:
        """A batch of one line about the log itself. There must be a ring."""
        record = self._record(Report(0, severity, message), time.monotonic_ns())
        origins = np.zeros(1, np.int32)
        return Batch(record.reshape(1, -1), origins, self._formats.steps, self._formats.literals, self._printable)

    def entry(self, batch: Batch, index: int) -> LogEntry:
        """One record of a batch as Python has it."""
        ring: SharedSPSCRingBuffer = self.rings[batch.origins[index]]
        return ring.decode(batch.records[index].tobytes())

    def lag(self) -> int:
        """Records written and not yet read."""
        return int(
            sum(
                min(max(ring.segment.get("write_cursor") - int(cursor), 0), ring.capacity)
                for ring, cursor in zip(self.rings, self._sources["cursor"], strict=True)
            )
        )

    def _load_formats(self) -> None:
        for index, ring in enumerate(self.rings):
            registered = ring.segment.get("formats_registered")
            if registered != self._registered[index]:
                self._registered[index] = registered
                for number in range(1, FORMATS_MAX):
                    self._formats.load(index, number, ring.segment.format(number))

    # --- losses -------------------------------------------------------------------------------------

    @staticmethod
    def _suppressed(ring: SharedSPSCRingBuffer) -> list[int]:
        return [ring.segment.suppressed(number) for number in range(FORMATS_MAX)]

    def _reports(self, now_ns: int, everything: bool) -> list[Report]:
        """What was lost, of as many rings as a batch has room for; the others' turn comes with the next."""
        reports: list[Report] = []
        first, self._next_report = self._next_report, 0
        for index in [*range(first, len(self.rings)), *range(min(first, len(self.rings)))]:
            if len(reports) + REPORTS_OF_RING_MAX > REPORTS_MAX:
                self._next_report = index
                break
            reports += self._drop_reports(index, now_ns, everything)
            reports += self._other_reports(index, now_ns, everything)
        self._checked_ns = now_ns
        return reports

    def _drop_reports(self, index: int, now_ns: int, everything: bool) -> list[Report]:
        """One warning when a full ring has room again, or once a second while it has not."""
        losses, total = self._losses[index], self.rings[index].segment.dropped()
        # A writer that went wrong may count backwards.
        more = [max(after - before, 0) for before, after in zip(losses.dropped, total, strict=True)]
        losses.dropped = total
        grown = any(more)
        if grown:
            losses.since_ns = losses.since_ns or self._checked_ns
            losses.untold = [before + after for before, after in zip(losses.untold, more, strict=True)]
        if not losses.since_ns:
            return []
        if grown and not everything and now_ns - losses.since_ns < REPORT_INTERVAL_NS:
            return []
        by_severity = ", ".join(
            f"{count} {severity.name}" for severity, count in zip(Severity, losses.untold, strict=True) if count
        )
        span_ms = (now_ns - losses.since_ns) / 1e6
        name = self.rings[index].segment.name
        message = f"{sum(losses.untold)} records dropped in {span_ms:.0f} ms, {name} was full: {by_severity}"
        losses.since_ns, losses.untold = 0, [0] * len(Severity)
        return [Report(index, Severity.Warning, message)]

    def _other_reports(self, index: int, now_ns: int, everything: bool) -> list[Report]:
        losses, ring, source = self._losses[index], self.rings[index], self._sources[index]
        reports = []
        missed, damaged = int(source["missed"]), int(source["damaged"])
        unfinished = ring.segment.get("unfinished")
        if missed != losses.missed:
            message = f"{missed - losses.missed} records overwritten in {ring.segment.name} before they were read"
            reports.append(Report(index, Severity.Warning, message))
        if damaged != losses.damaged:
            message = f"{damaged - losses.damaged} damaged records passed over in {ring.segment.name}"
            reports.append(Report(index, Severity.Warning, message))
        if unfinished != losses.unfinished:
            message = f"A writer of {ring.segment.name} was killed in the middle of a record, which is lost"
            reports.append(Report(index, Severity.Warning, message))
        losses.missed, losses.damaged, losses.unfinished = missed, damaged, unfinished
        if everything or now_ns - losses.told_ns >= REPORT_INTERVAL_NS:
            losses.told_ns = now_ns
            suppressed = self._suppressed(ring)
            for number, (before, after) in enumerate(zip(losses.suppressed, suppressed, strict=True)):
                if after > before:
                    what = ring.segment.format(number) if number else "text"
                    message = f"{after - before} records suppressed by their rate limit: {what}"
                    reports.append(Report(index, Severity.Warning, message))
            losses.suppressed = suppressed
        return reports

    def _record(self, report: Report, now_ns: int) -> Any:
        """A report as a record of its ring, so that it goes the way of all lines."""
        record = np.zeros(1, _RECORD_DTYPE)
        text = cut(report.message.encode("utf-8", "backslashreplace"))
        ring = self.rings[report.ring]
        core = ring.core & 0xFF  # of a damaged header it is any number
        record[0] = (STATE_READY, report.severity, ring.facility, len(text), 0, core, now_ns, 0, text)
        return record.view(np.uint8)
