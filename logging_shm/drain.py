"""The drain: one thread that reads every ring, merges them by time, and writes lines.

Owned by the supervisor. A sink that fails is counted and never stops the reading, so rings don't fill because
nobody can see them.
"""

import json
import threading
import time
from collections.abc import Iterable
from typing import TextIO

from logging_shm.facility import Severity
from logging_shm.ring import LogEntry, SharedSPSCRingBuffer

SLEEP_S_MIN = 0.001
SLEEP_S_MAX = 0.010
BATCH_RECORDS_MAX = 4096  # of one ring before the others have their turn


def format_text(entry: LogEntry) -> str:
    """The line that operators grep for."""
    return f"[{entry.severity.name}] [{entry.facility.name}] {entry.message}"


def format_json(entry: LogEntry) -> str:
    """One JSON object a line."""
    return json.dumps(
        {
            "severity": entry.severity.name,
            "facility": entry.facility.name,
            "message": entry.message,
            "core": entry.core,
            "timestamp_ns": entry.timestamp_ns,
            "sequence": entry.sequence,
            "pid": entry.process,
            **dict(entry.pairs),
        }
    )


class Drain:
    """Reads rings in a thread of its own until `stop`. Rings come and go while it runs."""

    def __init__(self, out: TextIO, as_json: bool = False) -> None:
        self._out = out
        self._format = format_json if as_json else format_text
        self._rings: list[SharedSPSCRingBuffer] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log-drain", daemon=True)
        self.lines_lost = 0

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def add(self, rings: Iterable[SharedSPSCRingBuffer]) -> None:
        """Read these, too."""
        with self._lock:
            self._rings += rings

    def remove(self, rings: Iterable[SharedSPSCRingBuffer]) -> None:
        """Write what these still hold, then forget them."""
        with self._lock:
            self._drain_once()
            for ring in rings:
                self._rings.remove(ring)

    def stop(self) -> None:
        """Write everything that is left, then end the thread."""
        self._stop.set()
        self._thread.join()
        with self._lock:
            while self._drain_once():
                pass

    def _run(self) -> None:
        sleep_s = SLEEP_S_MIN
        while not self._stop.is_set():
            with self._lock:
                count = self._drain_once()
            if count:
                sleep_s = SLEEP_S_MIN
                if count >= BATCH_RECORDS_MAX:
                    continue
            self._stop.wait(sleep_s)
            sleep_s = min(sleep_s * 2, SLEEP_S_MAX)

    def _drain_once(self) -> int:
        entries: list[LogEntry] = []
        for ring in self._rings:
            for _ in range(BATCH_RECORDS_MAX):
                entry = ring.read()
                if entry is None:
                    break
                entries.append(entry)
            dropped = ring.dropped()
            if dropped:
                entries.append(self._gap(ring, dropped))
        if not entries:
            return 0
        entries.sort(key=lambda entry: entry.timestamp_ns)
        try:
            self._out.write("".join(self._format(entry) + "\n" for entry in entries))
            self._out.flush()
        except (OSError, ValueError):
            self.lines_lost += len(entries)
        return len(entries)

    def _gap(self, ring: SharedSPSCRingBuffer, dropped: int) -> LogEntry:
        like = ring.decode(bytes(256))
        return LogEntry(
            severity=Severity.Warning,
            facility=like.facility,
            message=f"{dropped} records dropped: the ring /dev/shm/{ring.segment.name} was full",
            core=like.core,
            timestamp_ns=time.monotonic_ns(),
        )
