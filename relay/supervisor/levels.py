"""Log levels: reading and setting those of rings, chosen by facility and core."""

from collections.abc import Sequence

from logging_shm import Facility, Severity, SharedSPSCRingBuffer
from relay.config import LOG_LEVELS
from relay.errors import RelayError

UNPINNED = (Facility.Supervisor, Facility.ControlPlane)


def choose(rings: Sequence[SharedSPSCRingBuffer], facility: str | None, core: int | None) -> list[SharedSPSCRingBuffer]:
    """Rings by facility and core, both optional. Raises RelayError when there is none such."""
    chosen = [
        ring
        for ring in rings
        if (facility is None or ring.facility.name.lower() == facility.lower())
        and (core is None or (ring.core == core and ring.facility not in UNPINNED))
    ]
    if not chosen:
        names = ", ".join(sorted({ring.facility.name for ring in rings}))
        raise RelayError(f"no log ring of facility {facility} and core {core}: facilities are {names}")
    return chosen


def set_level(rings: Sequence[SharedSPSCRingBuffer], level: str) -> None:
    """Write only what is as grave as `level` or graver. Raises RelayError for an unknown level."""
    if level not in LOG_LEVELS:
        raise RelayError(f"level {level!r}: allowed are {', '.join(LOG_LEVELS)}")
    for ring in rings:
        ring.segment.level = Severity[level.capitalize()]


def of(rings: Sequence[SharedSPSCRingBuffer]) -> dict[str, str]:
    """The level of each ring by its segment's name."""
    return {ring.segment.name: ring.segment.level.name.lower() for ring in rings}
