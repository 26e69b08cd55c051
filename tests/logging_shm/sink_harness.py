"""What the tests of the sinks share: a ring that feeds a sink, and waiting for states.

ring ─▶ Reader ─▶ batch ─▶ Sink.accept ┄ the sink's thread ┄▶ target
                                └─ what the sink tells of itself ─▶ Feed.told
"""

import itertools
import os
import socket
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from logging_shm import Facility, Reader, Severity, SharedSPSCRingBuffer
from logging_shm.sinks.base import Sink

DEADLINE_S = 30.0
CAPACITY = 4096
_serial = itertools.count(1)


def until(reached: Callable[[], object], what: str = "the state") -> None:
    """Wait until something holds. Fails after a deadline that nothing here comes near."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not reached():
        assert time.monotonic() < deadline_s, f"{what} was not reached in {DEADLINE_S} s"
        time.sleep(0.002)


class Feed:
    """Gives records to sinks as a drain does, one batch a call; closes them at the end."""

    def __init__(self, facility: Facility = Facility.Test, core: int | None = None) -> None:
        name = f"mcr_test{os.getpid()}_feed{next(_serial)}"
        self.ring = SharedSPSCRingBuffer.create(name, CAPACITY, facility, core=core)
        self._reader = Reader()
        self._reader.add([self.ring])
        self._sinks: list[Sink] = []
        self.told: list[tuple[Severity, str]] = []

    def start(self, sink: Sink) -> None:
        """Start a sink that is closed at the end of the test."""
        self._sinks.append(sink)
        sink.start(lambda severity, message: self.told.append((severity, message)))

    def give(self, sink: Sink, *texts: str, severity: Severity = Severity.Info, **pairs: str) -> None:
        """Have a sink accept these as one batch."""
        for text in texts:
            assert self.ring.append(severity, text, list(pairs.items()))
        sink.accept(self._reader.read(everything=True))

    def told_of(self, severity: Severity) -> list[str]:
        """What the sinks told about themselves, of a severity."""
        return [message for told, message in self.told if told is severity]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sink in self._sinks:
            sink.close()
        self.ring.shutdown()


def free_port(kind: socket.SocketKind) -> int:
    """A port of 127.0.0.1 that nobody uses."""
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
