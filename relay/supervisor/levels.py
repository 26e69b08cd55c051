"""Log levels as clients name them: which rings a facility and a core mean. Pure but for reading the rings' headers."""

from collections.abc import Sequence

from logging_shm import Facility, Severity, SharedSPSCRingBuffer
from relay.config import LOG_LEVELS
from relay.errors import RelayError


def choose(rings: Sequence[SharedSPSCRingBuffer], facility: str | None, core: int | None) -> list[SharedSPSCRingBuffer]:
    """Rings by facility and core, both optional. Raises RelayError when there is none such."""
    chosen = [
        ring
        for ring in rings
        if (facility is None or ring.facility.name.lower() == facility.lower()) and core in (None, ring.core)
    ]
    if not chosen:
        names = ", ".join(sorted({ring.facility.name for ring in rings}))
        raise RelayError(f"no log ring of facility {facility} and core {core}: facilities are {names}")
    return chosen


def parse_level(level: str) -> Severity:
    """Raises RelayError for a word that is no level."""
    if level not in LOG_LEVELS:
        raise RelayError(f"level {level!r}: allowed are {', '.join(LOG_LEVELS)}")
    return Severity[level.capitalize()]


def parse_facility(facility: str | None) -> Facility | None:
    """The facility of a name that `choose` has found rings of."""
    return next((known for known in Facility if facility and known.name.lower() == facility.lower()), None)


def of(rings: Sequence[SharedSPSCRingBuffer]) -> dict[str, str]:
    """The level of each ring by its segment's name."""
    return {ring.segment.name: ring.segment.level.name.lower() for ring in rings}
