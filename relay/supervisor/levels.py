"""Log levels as clients name them: which rings a facility and a core mean. Pure but for reading the rings' headers."""

from collections.abc import Sequence

from logging_shm import Facility, Severity, SharedSPSCRingBuffer
from logging_shm.facility import FACILITIES, SEVERITIES
from relay.errors import RelayError


def choose(rings: Sequence[SharedSPSCRingBuffer], facility: str | None, core: int | None) -> list[SharedSPSCRingBuffer]:
    """Rings by facility and core, both optional. Raises RelayError when there is none such."""
    wanted = parse_facility(facility)
    chosen = [ring for ring in rings if (facility is None or ring.facility is wanted) and core in (None, ring.core)]
    if not chosen:
        of_facility = f" of facility {facility}" if facility is not None else ""
        of_core = f" of core {core}" if core is not None else ""
        names = ", ".join(sorted({ring.facility.name for ring in rings}))
        cores = ", ".join(sorted({str(ring.core) for ring in rings if ring.core is not None}))
        raise RelayError(f"no log ring{of_facility}{of_core}: facilities are {names}, cores of workers {cores}")
    return chosen


def parse_level(level: str) -> Severity:
    """Raises RelayError for a word that is no level."""
    if level not in SEVERITIES:
        raise RelayError(f"level {level!r}: allowed are {', '.join(SEVERITIES)}")
    return SEVERITIES[level]


def parse_facility(facility: str | None) -> Facility | None:
    """The facility of a name; None for no name, and for one that is none."""
    return FACILITIES.get(facility.lower()) if facility is not None else None


def of(rings: Sequence[SharedSPSCRingBuffer]) -> dict[str, str]:
    """The level of each ring by its segment's name."""
    return {ring.segment.name: ring.segment.level.name.lower() for ring in rings}
