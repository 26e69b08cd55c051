"""What sinks share: choosing and formatting records in the drain's thread, delivering in a thread of their own.

A sink that is slow or dead fills its own backlog, then loses lines of its own, counted and told. Nobody waits for it.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from logging_shm.append import constant
from logging_shm.facility import Facility, Severity
from logging_shm.lines import FORMATTERS, LINE_BYTES_MAX, Batch, Frame
from logging_shm.reader import BATCH_RECORDS, REPORTS_MAX
from logging_shm.sinks.selection import Selection

BACKLOG_BYTES = 64 << 20  # a second's worth at the rate that the drain can reach
CHUNK_BYTES = 1 << 20
RETRY_S_MIN = 0.1
RETRY_S_MAX = 5.0
CLOCK_STEP_NS = 100_000
CLOSE_S_MAX = 1.0  # for the backlog at the end

Tell = Callable[[Severity, str], None]


class Chunk(NamedTuple):
    """Formatted messages: their bytes, and where each ends."""

    data: bytes
    ends: Any  # i8[lines]


def _levels(selection: Selection) -> Any:
    return np.array([selection.level if f in selection.facilities else -1 for f in Facility], np.int8)


class WallClock:
    """CLOCK_REALTIME less CLOCK_MONOTONIC, steady but for real steps: a record has one time in all sinks."""

    def __init__(self) -> None:
        self._offset_ns = 0

    def offset_ns(self) -> int:
        """The offset now."""
        offset_ns = time.time_ns() - time.monotonic_ns()
        if abs(offset_ns - self._offset_ns) > CLOCK_STEP_NS:
            self._offset_ns = offset_ns
        return self._offset_ns


wall_clock = WallClock()


class Formatter:
    """Turns batches into chunks, in compiled code."""

    def __init__(self, kind: str, selection: Selection) -> None:
        self._format = FORMATTERS[kind]
        self._out = np.empty(CHUNK_BYTES + LINE_BYTES_MAX, np.uint8)
        self._ends = np.empty(BATCH_RECORDS + REPORTS_MAX, np.int64)
        prefix = f"{selection.host or '-'} {selection.application} "
        self._frame = Frame(
            levels=_levels(selection),
            realtime_offset_ns=0,
            timestamps=selection.timestamps,
            fields=selection.fields,
            colours=selection.colours,
            host=constant(prefix),
            syslog_facility=selection.syslog_facility,
        )

    def chunks(self, batch: Batch, realtime_offset_ns: int | None = None) -> Iterable[Chunk]:
        """The wanted records of a batch, formatted. Wall-clock time is what the clock says now, unless given."""
        if realtime_offset_ns is None:
            realtime_offset_ns = wall_clock.offset_ns()
        frame = self._frame._replace(realtime_offset_ns=realtime_offset_ns)
        done = 0
        while done < len(batch.records):
            done, lines, size = self._format(batch, done, frame, self._out, self._ends)
            if lines:
                yield Chunk(self._out[:size].tobytes(), self._ends[:lines].copy())


class Sink:
    """A sink; `deliver` and `close_target` are what kinds of sinks differ in.

    The drain's thread calls `accept`, `reopen` and `close`; the sink's own thread does the rest.
    """

    def __init__(
        self, name: str, kind: str = "text", selection: Selection | None = None, backlog_bytes: int = BACKLOG_BYTES
    ) -> None:
        self.name = name
        self.written = 0
        self.lost = 0
        self._formatter = Formatter(kind, selection or Selection())
        self._backlog_bytes_max = backlog_bytes
        self._backlog: deque[Chunk] = deque()
        self._backlog_bytes = 0
        self._wake = threading.Condition()
        self._closing = False
        self._reopen = False
        self._tell: Tell = lambda severity, message: None
        self._overrun = 0  # lines lost to a full backlog since it was told
        self._thread = threading.Thread(target=self._run, name=f"log-sink {name}", daemon=True)

    # --- the drain's side ---------------------------------------------------------------------------

    def start(self, tell: Tell) -> None:
        """Begin to deliver. `tell` takes lines about the sink itself to all sinks; it may be called by any thread."""
        self._tell = tell
        self._thread.start()

    def accept(self, batch: Batch) -> None:
        """Format what is wanted of a batch and queue it; where the backlog is full, lose and count it."""
        for chunk in self._formatter.chunks(batch):
            with self._wake:
                if self._backlog_bytes + len(chunk.data) > self._backlog_bytes_max:
                    self.lost += len(chunk.ends)
                    self._overrun += len(chunk.ends)
                    continue
                self._backlog.append(chunk)
                self._backlog_bytes += len(chunk.data)
                self._wake.notify()

    def reopen(self) -> None:
        """Open the target anew before the next line: a file may have been moved away."""
        with self._wake:
            self._reopen = True
            self._wake.notify()

    def close(self) -> None:
        """Deliver the backlog, for at most CLOSE_S_MAX, then end. What is left is lost, and counted."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(CLOSE_S_MAX)
        self.lost += sum(len(chunk.ends) for chunk in list(self._backlog))

    # --- the sink's own thread ----------------------------------------------------------------------

    def deliver(self, chunk: Chunk) -> int:
        """Write a chunk; return how many messages of it were written. Raises OSError."""
        raise NotImplementedError

    def close_target(self) -> None:
        """Close what `deliver` opened."""
        raise NotImplementedError

    def maintain(self) -> None:
        """What is due by time, such as a rotation."""

    def _run(self) -> None:
        failed_since_s = 0.0
        lost_before = 0
        retry_s = RETRY_S_MIN
        while True:
            chunk = self._next(retry_s if failed_since_s else None)
            if chunk is None:
                break
            try:
                done = self.deliver(chunk) if chunk.data else 0
            except OSError as error:
                if not failed_since_s:
                    failed_since_s, lost_before = time.monotonic(), self.lost
                    self._tell(
                        Severity.Error, f"Log sink {self.name}: {error.strerror or error}: lines wait, then are lost"
                    )
                self._put_back(chunk)
                retry_s = min(retry_s * 2, RETRY_S_MAX)
                if self._closing:
                    break
                continue
            self.written += done
            self.lost += len(chunk.ends) - done
            retry_s = RETRY_S_MIN
            if failed_since_s and chunk.data:
                seconds = time.monotonic() - failed_since_s
                lost = self.lost - lost_before
                self._tell(
                    Severity.Notice, f"Log sink {self.name} works again after {seconds:.1f} s, {lost} lines lost"
                )
                failed_since_s, self._overrun = 0.0, 0
            elif self._overrun and self._backlog_bytes < self._backlog_bytes_max // 2:
                overrun, self._overrun = self._overrun, 0
                self._tell(Severity.Warning, f"Log sink {self.name} was too slow: {overrun} lines lost")
        self.close_target()

    def _next(self, retry_s: float | None) -> Chunk | None:
        """The next chunk, an empty one when something else is due; None at the end."""
        with self._wake:
            if retry_s is not None and not self._closing:
                self._wake.wait(retry_s)
            elif not self._backlog and not self._closing and not self._reopen:
                self._wake.wait(1.0)
            if self._reopen:
                self._reopen = False
                self.close_target()
            self.maintain()
            if self._backlog:
                chunk = self._backlog.popleft()
                self._backlog_bytes -= len(chunk.data)
                return chunk
            return None if self._closing else Chunk(b"", ())

    def _put_back(self, chunk: Chunk) -> None:
        with self._wake:
            self._backlog.appendleft(chunk)
            self._backlog_bytes += len(chunk.data)


def messages(chunk: Chunk) -> Iterable[bytes]:
    """The messages of a chunk one by one."""
    start = 0
    for end in chunk.ends.tolist():
        yield chunk.data[start:end]
        start = end
