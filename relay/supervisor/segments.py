"""What a former supervisor left behind when it was killed: found at start, removed, and told.

The segments of one instance are known by their names alone; a living owner makes them untouchable.
"""

import re
import time
from pathlib import Path

import posix_ipc

from logging_shm import Facility
from logging_shm.facility import segment_name
from logging_shm.segment import Segment, SegmentError, owner_is_alive
from relay.errors import PreflightError

SHM_DIRECTORY = Path("/dev/shm")
OF_AN_INSTANCE = r"(supervisor|controlplane|dp_c\d+_(dataplane|ingress|egress|bufferpool|stats))"
ORPHANS_END_S = 3.0  # workers of a killed supervisor drain their rings and end
ORPHANS_POLL_S = 0.02


def names_of(instance: str | None) -> list[str]:
    """The segments of an instance that exist."""
    prefix = f"mcr_{re.escape(instance)}_" if instance else "mcr_"
    return sorted(entry.name for entry in SHM_DIRECTORY.iterdir() if re.fullmatch(prefix + OF_AN_INSTANCE, entry.name))


def _owner(name: str) -> int | None:
    """The pid of the living process that owns a segment, None when there is none."""
    try:
        segment = Segment.attach(name)
    except SegmentError:
        return None
    return int(segment.header["owner_pid"]) if owner_is_alive(segment) else None


def remove_stale(instance: str | None) -> list[str]:
    """Remove the segments that a killed supervisor of this instance left; return their names.

    Raises PreflightError that names the process when one still uses them.
    """
    supervisor = segment_name(Facility.Supervisor, instance=instance)
    deadline_s = time.monotonic() + ORPHANS_END_S
    for name in sorted(names_of(instance), key=lambda name: name != supervisor):
        while (pid := _owner(name)) is not None:
            if name == supervisor or time.monotonic() > deadline_s:
                raise PreflightError(f"process {pid} uses /dev/shm/{name}: stop it, or choose another --instance")
            time.sleep(ORPHANS_POLL_S)
    names = names_of(instance)
    for name in names:
        posix_ipc.unlink_shared_memory(f"/{name}")
    return names
