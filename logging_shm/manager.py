"""The manager: a worker's four rings from the supervisor's side: created here, unlinked here at the end."""

from collections.abc import Mapping
from types import TracebackType
from typing import Self

from logging_shm.facility import WORKER_FACILITIES, Facility, segment_name
from logging_shm.levels import LevelPolicy
from logging_shm.ring import SharedSPSCRingBuffer


class SharedMemoryLogManager:
    """Owns the rings of one worker; a context manager."""

    def __init__(self, core_id: int, rings: dict[Facility, SharedSPSCRingBuffer]) -> None:
        self.core_id = core_id
        self.rings = rings

    @classmethod
    def create_for_worker(
        cls,
        core_id: int,
        instance: str | None = None,
        uid: int = -1,
        gid: int = -1,
        formats: Mapping[int, str] | None = None,
        limits: Mapping[int, tuple[float, int]] | None = None,
        levels: LevelPolicy | None = None,
    ) -> Self:
        """Create the rings, owned by the worker's user. Raises SegmentError; nothing is left behind then.

        `limits`: by format number, how many records a second and how many at once.
        """
        rings: dict[Facility, SharedSPSCRingBuffer] = {}
        try:
            for facility in WORKER_FACILITIES:
                rings[facility] = SharedSPSCRingBuffer.create(
                    segment_name(facility, core_id, instance),
                    facility=facility,
                    core=core_id,
                    instance=instance,
                    formats=dict(formats or {}),
                    uid=uid,
                    gid=gid,
                )
                for number, (per_second, burst) in (limits or {}).items():
                    rings[facility].segment.limit(number, per_second, burst)
        except BaseException:
            for ring in rings.values():
                ring.shutdown()
            raise
        if levels is not None:
            levels.apply(rings.values())
        return cls(core_id, rings)

    def shutdown(self) -> None:
        """Unlink the segments."""
        for ring in self.rings.values():
            ring.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()
