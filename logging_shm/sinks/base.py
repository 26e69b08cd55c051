"""What sinks share: choosing and formatting records in the drain's thread, delivering in a thread of their own.

A sink that is slow or dead fills its own backlog, then loses lines of its own, counted and told. Nobody waits for it.
What a sink was given is in the end written or lost: `written + lost` is exact, whatever happens on the way.

After a fork, the child's copy of a sink is empty and not started: what it held is the parent's to deliver.
"""

import contextlib
import os
import re
import threading
import time
import weakref
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
MERGE_BYTES = 256 << 10  # chunks that wait are joined up to this: costs a memcpy, saves a round trip or system call
RETRY_S_MIN = 0.1
RETRY_S_MAX = 5.0
IDLE_S = 1.0  # how often a sink without work looks for what is due by time
CLOCK_STEP_NS = 100_000
CLOSE_S_MAX = 1.0  # for the backlog at the end
NAME_LENGTH_MAX = 60  # of 160 bytes that a line about the sink may have

Tell = Callable[[Severity, str], None]


class Chunk(NamedTuple):
    """Formatted messages: their bytes, and where each ends."""

    data: bytes
    ends: Any  # i8[lines]

    def start(self, index: int) -> int:
        """Where a message begins."""
        return int(self.ends[index - 1]) if index else 0

    def joined(self, other: "Chunk") -> "Chunk":
        """This chunk with another behind it."""
        return Chunk(self.data + other.data, np.concatenate((self.ends, other.ends + len(self.data))))


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
        host = re.sub(r"[^!-~]", "_", selection.host) or "-"  # RFC 5424, 6: HOSTNAME is printable ASCII
        prefix = f"{host} {selection.application} "
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
        self.name = name if len(name) <= NAME_LENGTH_MAX else f"{name[:20]}…{name[21 - NAME_LENGTH_MAX :]}"
        self._formatter = Formatter(kind, selection or Selection())
        self._backlog_bytes_max = backlog_bytes
        self._tell: Tell = lambda severity, message: None
        self._begin_empty()
        _sinks.add(self)

    def _begin_empty(self) -> None:
        self.written = 0
        self.lost = 0
        self._lost_told = 0
        self.done = 0  # messages of the present chunk, the first of the backlog, that were written or refused
        self._refusal = ""  # why a message was passed over
        self._failed_since_s = 0.0  # 0: it works
        self._retry_s = 0.0  # 0: don't wait
        self._backlog: deque[Chunk] = deque()
        self._backlog_bytes = 0
        self._wake = threading.Condition()
        self._closing = False
        self.ended = False  # what is left was counted as lost: deliver no more
        self._reopen = False
        self._overrun = False
        self._thread = threading.Thread(target=self._run, name=f"log-sink {self.name}", daemon=True)

    # --- the drain's side ---------------------------------------------------------------------------

    def start(self, tell: Tell) -> None:
        """Begin to deliver. `tell` takes lines about the sink itself to all sinks; it may be called by any thread."""
        self._tell = tell
        self._thread.start()

    def accept(self, batch: Batch) -> None:
        """Format what is wanted of a batch and queue it; where the backlog is full, lose and count it."""
        for chunk in self._formatter.chunks(batch):
            if not self._queue(chunk):
                self._tell(Severity.Warning, f"Log sink {self.name} is too slow: its backlog is full, lines are lost")

    def _queue(self, chunk: Chunk) -> bool:
        """False when an overrun begins, which is to be told."""
        with self._wake:
            if self.ended or self._backlog_bytes + len(chunk.data) > self._backlog_bytes_max:
                self.lost += len(chunk.ends)
                told = self.ended or self._overrun or self._failed_since_s != 0
                self._overrun = not self.ended
                return told
            # The first may be under way.
            if len(self._backlog) > 1 and len(self._backlog[-1].data) + len(chunk.data) <= MERGE_BYTES:
                self._backlog.append(self._backlog.pop().joined(chunk))
            else:
                self._backlog.append(chunk)
            self._backlog_bytes += len(chunk.data)
            self._wake.notify()
            return True

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
        if self._thread.is_alive():
            self._thread.join(CLOSE_S_MAX)
        with self._wake:
            self.ended = True
            self.lost += sum(len(chunk.ends) for chunk in self._backlog) - self.done
            self._backlog.clear()
            self._backlog_bytes = self.done = 0

    # --- the sink's own thread ----------------------------------------------------------------------

    def deliver(self, chunk: Chunk) -> None:
        """Write a chunk from its message `done` on, and say how far that went with `advance` and `refuse`.

        Raises OSError, and is called again for the rest.
        """
        raise NotImplementedError

    def close_target(self) -> None:
        """Close what `deliver` opened."""
        raise NotImplementedError

    def maintain(self) -> None:
        """What is due by time, such as a rotation."""

    def advance(self, count: int) -> None:
        """For `deliver`: so many more messages were written."""
        with self._wake:
            if not self.ended:
                self.written += count
                self.done += count

    def refuse(self, reason: object) -> None:
        """For `deliver`: the next message can't be written, now or ever: it is lost."""
        with self._wake:
            if not self.ended:
                self.lost += 1
                self.done += 1
                self._refusal = str(reason)

    def _run(self) -> None:
        while self._wait():
            self._refusal = ""
            try:
                chunk = self._prepare()
                if chunk is not None:
                    self.deliver(chunk)
                    assert self.ended or self.done == len(chunk.ends)
            except OSError as error:
                self._fail(error.strerror or error, "lines wait, then are lost")
            except Exception as error:  # whatever it was, this sink's thread goes on
                self._fail(f"{type(error).__name__}: {error}", "lines wait, then are lost")
            else:
                self._retry_s = 0.0
                if chunk is not None:
                    self._finish(chunk)
                continue
            if self._closing:
                break
            self._retry_s = min(self._retry_s * 2 or RETRY_S_MIN, RETRY_S_MAX)
        with contextlib.suppress(OSError):
            self.close_target()

    def _wait(self) -> bool:
        """Until there is something to do, or a failed sink may try again; False at the end."""
        until_s = time.monotonic() + (self._retry_s or IDLE_S)
        with self._wake:
            while not (self._closing or self._reopen or (self._backlog and not self._retry_s)):
                left_s = until_s - time.monotonic()
                if left_s <= 0:
                    break
                self._wake.wait(left_s)
            return not self.ended and not (self._closing and not self._backlog)

    def _prepare(self) -> Chunk | None:
        """Do what is due besides lines; return the present chunk."""
        with self._wake:
            reopen, self._reopen = self._reopen, False
            chunk = self._backlog[0] if self._backlog else None
        if reopen:
            self.close_target()
        self.maintain()
        return chunk

    def _finish(self, chunk: Chunk) -> None:
        """A chunk is delivered: forget it, and tell what changed."""
        with self._wake:
            if self.ended:
                return
            self._backlog.popleft()
            self._backlog_bytes -= len(chunk.data)
            self.done = 0
        if self._refusal:
            self._fail(self._refusal, "lines are lost")
        elif self._failed_since_s:
            seconds = time.monotonic() - self._failed_since_s
            self._failed_since_s = 0.0
            self._tell_lost(f"works again after {seconds:.1f} s")
        elif self._overrun and self._backlog_bytes < self._backlog_bytes_max // 2:
            self._tell_lost("keeps up again")

    def _fail(self, reason: object, consequence: str) -> None:
        if not self._failed_since_s:
            self._failed_since_s = time.monotonic()
            self._tell(Severity.Error, f"Log sink {self.name}: {reason}: {consequence}")

    def _tell_lost(self, what: str) -> None:
        with self._wake:
            lost, self._lost_told = self.lost - self._lost_told, self.lost
            self._overrun = False
        self._tell(Severity.Notice, f"Log sink {self.name} {what}, {lost} lines lost")

    def after_fork_in_child(self) -> None:
        """Whatever lock another thread held is new, and what the parent's thread will deliver is not here twice."""
        self._begin_empty()
        with contextlib.suppress(OSError):
            self.close_target()


_sinks: "weakref.WeakSet[Sink]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for sink in list(_sinks):
        sink.after_fork_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)


def messages(chunk: Chunk, first: int = 0) -> Iterable[bytes]:
    """The messages of a chunk one by one, from the message `first` on."""
    start = chunk.start(first)
    for end in chunk.ends[first:].tolist():
        yield chunk.data[start:end]
        start = end
