"""Loggers: how a Python process writes into rings. Several threads or tasks may share a Logger."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from logging_shm.facility import WORKER_FACILITIES, Facility, Severity, segment_name
from logging_shm.ring import SharedSPSCRingBuffer

# An IntEnum's arithmetic costs more than the whole record.
EMERGENCY, ALERT, CRITICAL, ERROR, WARNING, NOTICE, INFO, DEBUG = map(int, Severity)


def _texts(pairs: dict[str, object]) -> Sequence[tuple[str, str]]:
    return [(key, str(value)) for key, value in pairs.items()] if pairs else ()


class Logger:
    """Writes text records into a ring. Up to two keyword pairs go along."""

    def __init__(self, ring: SharedSPSCRingBuffer) -> None:
        self._append = ring.append

    def log(self, severity: int, message: str, **pairs: object) -> bool:
        """Write one record; False when its level is off or the ring is full."""
        return self._append(severity, message, _texts(pairs))

    def emergency(self, message: str, **pairs: object) -> bool:
        """The system is unusable."""
        return self._append(EMERGENCY, message, _texts(pairs))

    def alert(self, message: str, **pairs: object) -> bool:
        """Somebody must act at once."""
        return self._append(ALERT, message, _texts(pairs))

    def critical(self, message: str, **pairs: object) -> bool:
        """A part failed."""
        return self._append(CRITICAL, message, _texts(pairs))

    def error(self, message: str, **pairs: object) -> bool:
        """Something was not done."""
        return self._append(ERROR, message, _texts(pairs))

    def warning(self, message: str, **pairs: object) -> bool:
        """Something may go wrong."""
        return self._append(WARNING, message, _texts(pairs))

    def notice(self, message: str, **pairs: object) -> bool:
        """Normal but significant."""
        return self._append(NOTICE, message, _texts(pairs))

    def info(self, message: str, **pairs: object) -> bool:
        """For information."""
        return self._append(INFO, message, _texts(pairs))

    def debug(self, message: str, **pairs: object) -> bool:
        """For whoever looks for a fault."""
        return self._append(DEBUG, message, _texts(pairs))


class _Logging:
    """Rings that the calling process writes, by facility. A context manager."""

    def __init__(self, rings: dict[Facility, SharedSPSCRingBuffer]) -> None:
        self.rings = rings

    def logger(self, facility: Facility) -> Logger:
        """The Logger of a facility. Raises KeyError for one that this process has no ring for."""
        return Logger(self.rings[facility])

    def segment(self, facility: Facility) -> Any:
        """The mapped uint8 array of a facility's segment, for compiled code."""
        return self.rings[facility].segment.bytes

    def shutdown(self) -> None:
        """Unlink what this process created."""
        for ring in self.rings.values():
            ring.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()


class SupervisorLogging(_Logging):
    """The supervisor's ring, created by it."""

    def __init__(self, instance: str | None = None) -> None:
        name = segment_name(Facility.Supervisor, instance=instance)
        ring = SharedSPSCRingBuffer.create(name, facility=Facility.Supervisor, instance=instance)
        super().__init__({Facility.Supervisor: ring})


class ControlPlaneLogging(_Logging):
    """The control plane's ring, made by the supervisor and attached here."""

    @classmethod
    def attach(cls, instance: str | None = None) -> Self:
        """Write into the ring that the supervisor made. Raises SegmentError when there is none."""
        ring = SharedSPSCRingBuffer.attach(segment_name(Facility.ControlPlane, instance=instance))
        ring.segment.claim()
        return cls({Facility.ControlPlane: ring})


class DataPlaneLogging(_Logging):
    """The four rings of a worker, made by the supervisor and attached here."""

    @classmethod
    def attach(cls, core_id: int, instance: str | None = None) -> Self:
        """Write into a worker's rings, as their owner from now on. Raises SegmentError when they don't exist."""
        rings = {
            facility: SharedSPSCRingBuffer.attach(segment_name(facility, core_id, instance))
            for facility in WORKER_FACILITIES
        }
        for ring in rings.values():
            ring.segment.claim()
        return cls(rings)
