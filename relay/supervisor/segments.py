"""What a former supervisor left behind when it was killed: found at start, unread records rescued, names removed.

The segments of one instance are known by their names alone; a living owner makes them untouchable.
"""

import contextlib
import re
import time
from dataclasses import dataclass, field

from logging_shm import Facility, SegmentError, SharedSPSCRingBuffer
from logging_shm.facility import segment_name
from logging_shm.segment import SHM_DIRECTORY, owner_of, unlink
from relay.errors import PreflightError

OF_AN_INSTANCE = r"(supervisor|controlplane|dp_c\d+_(dataplane|ingress|egress|bufferpool|stats))"
ORPHANS_END_S = 3.0  # workers of a killed supervisor drain their rings and end
ORPHANS_POLL_S = 0.02


@dataclass
class Stale:
    """What was left: the names that are removed, and the log rings behind them, still mapped, to be read out."""

    names: list[str] = field(default_factory=list)
    rings: list[SharedSPSCRingBuffer] = field(default_factory=list)

    def unread(self) -> int:
        """Records that nobody has read yet."""
        return sum(ring.unread() for ring in self.rings)


def names_of(instance: str | None) -> list[str]:
    """The segments of an instance that exist."""
    prefix = f"mcr_{re.escape(instance)}_" if instance else "mcr_"
    return sorted(entry.name for entry in SHM_DIRECTORY.iterdir() if re.fullmatch(prefix + OF_AN_INSTANCE, entry.name))


def _owner(name: str) -> int | None:
    """The pid of the living process that owns a segment, None when there is none."""
    try:
        return owner_of(name)
    except SegmentError:
        return None


def remove_stale(instance: str | None) -> Stale:
    """Remove the segments that a killed supervisor of this instance left.

    Raises PreflightError that names the process when one still uses them.
    """
    supervisor = segment_name(Facility.Supervisor, instance=instance)
    deadline_s = time.monotonic() + ORPHANS_END_S
    for name in sorted(names_of(instance), key=lambda name: name != supervisor):
        while (pid := _owner(name)) is not None:
            if name == supervisor or time.monotonic() > deadline_s:
                raise PreflightError(f"process {pid} uses /dev/shm/{name}: stop it, or choose another --instance")
            time.sleep(ORPHANS_POLL_S)
    stale = Stale()
    for name in names_of(instance):
        with contextlib.suppress(SegmentError):
            ring = SharedSPSCRingBuffer.attach(name)
            ring.segment.finish_dead()
            stale.rings.append(ring)
        unlink(name)
        stale.names.append(name)
    return stale
