"""Segments: finds an instance's stats segments, maps them for reading, and copies what it needs of them.

A relay that restarts makes new segments under the old names: they are told apart by their inode. Nothing read here is
trusted; whoever owns a segment may even cut it short, see logging_shm/truncation.py.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import posix_ipc

from logging_shm.cli.choose import user_of
from logging_shm.segment import SHM_DIRECTORY, identity_of
from relay.cli.top.rates import EXACT_MAX, Counts, Places, count
from relay.dataplane.counters import StatsSegment, segment_name
from relay.dataplane.layout import STATS_MAGIC, DropCause
from relay.errors import PreflightError
from relay.stream_growth import Growth, Look

# Of each worker its core, the identity of its segment, and the generation of the rule table that it uses.
State = tuple[tuple[int, int, int], ...]
NAME = re.compile(r"mcr_(?:(?P<instance>.+)_)?dp_c(?P<core>\d{1,4})_stats")
CAUSES = [cause for cause in DropCause if cause is not DropCause.NONE]


def instance_of(name: str) -> str | None:
    """The instance that a stats segment belongs to, by its name."""
    match = NAME.fullmatch(name)
    return match["instance"] if match else None


def same_segments(state: State, other: State) -> bool:
    """Whether the same relay had both: one that starts anew makes segments anew."""
    return [worker[:2] for worker in state] == [worker[:2] for worker in other]


@dataclass(frozen=True)
class WorkerCounts:
    """The counters of one worker at one moment."""

    core: int
    pid: int
    heartbeat_ns: int
    received: int
    sent: int
    sent_bytes: int
    ring_fill_percent: int  # of its fullest ring, within the last 0.1 s
    ring_fill_percent_max: int  # the highest level of 50, 80, 95 that was passed, 0 for none
    drops: dict[str, int]  # by cause
    latencies: Any  # i8[LATENCY_BUCKETS], datagrams by bucket


def _read_worker(core: int, segment: StatsSegment) -> WorkerCounts:
    header = segment.header.copy()  # nobody changes it while it is looked through

    def number(value: Any) -> int:
        return min(max(int(value), 0), EXACT_MAX)

    drops = {cause.name.lower(): number(header["drops"][cause]) for cause in CAUSES}
    drops[DropCause.RING_FULL.name.lower()] = number(header["ring_full"])
    return WorkerCounts(
        core=core,
        pid=number(header["pid"]),
        heartbeat_ns=number(header["heartbeat_ns"]),
        received=number(header["packets_in"]),
        sent=number(header["packets_relayed"]),
        sent_bytes=number(header["bytes_relayed"]),
        ring_fill_percent=min(number(header["ring_fill_percent"].max()), 100),
        ring_fill_percent_max=min(number(header["ring_fill_max"].max()), 100),
        drops=drops,
        latencies=np.clip(segment.health["latency"], 0, EXACT_MAX),
    )


class Segments:
    """The stats segments of one instance that exist now."""

    def __init__(self, instance: str | None) -> None:
        self._instance = instance
        self._mapped: dict[int, tuple[int, StatsSegment]] = {}  # by core: identity, segment
        self._growths: dict[int, Growth] = {}  # by core

    def refresh(self) -> None:
        """Map what came, also in the place of what went. Raises PreflightError for what may not be read."""
        present = {}
        for core in self._cores():
            name = segment_name(core, self._instance)
            identity = identity_of(name)
            if identity is None:
                continue
            known = self._mapped.get(core)
            if known is not None and known[0] == identity:
                present[core] = known
            elif (segment := _attach(core, self._instance)) is not None:
                present[core] = (identity, segment)
        for core, (identity, segment) in self._mapped.items():
            if core not in present or present[core][0] != identity:
                segment.close()
        self._mapped = present
        self._growths = {core: self._growth(core, segment) for core, (_, segment) in present.items()}

    def _growth(self, core: int, segment: StatsSegment) -> Growth:
        known = self._growths.get(core)
        if known is not None and known.segment is segment:
            return known
        growth = Growth(segment)
        growth.look()  # what was before is over
        return growth

    def _cores(self) -> list[int]:
        cores = []
        for name in os.listdir(SHM_DIRECTORY):  # noqa: PTH208 - a tenth of iterdir's time, a few times a second
            match = NAME.fullmatch(name)
            if match and match["instance"] == self._instance:
                cores.append(int(match["core"]))
        return sorted(cores)

    def state(self) -> State:
        """What changes with the rules' places."""
        return tuple(
            (core, identity, int(segment.header["generation_seen"]))
            for core, (identity, segment) in self._mapped.items()
        )

    def workers(self) -> list[WorkerCounts]:
        """The counters of each worker."""
        return [_read_worker(core, segment) for core, (_, segment) in self._mapped.items()]

    def rules(self, places: Places) -> Counts:
        """The counters of each rule."""
        return count([(segment.rules, segment.outputs) for _, segment in self._mapped.values()], places)

    def streams(self) -> list[Look]:
        """The streams of each worker, and what was added to them since the last call."""
        return [growth.look() for growth in self._growths.values()]


def _attach(core: int, instance: str | None) -> StatsSegment | None:
    """A segment that is whole; None for one that goes or is being made. Raises PreflightError."""
    name = segment_name(core, instance)
    try:
        segment = StatsSegment.attach(core, instance, read_only=True)
    except posix_ipc.PermissionsError:
        raise PreflightError(f"{_forbidden(SHM_DIRECTORY / name)}: run as root, or as that user") from None
    except (posix_ipc.Error, OSError, ValueError):
        return None
    if int(segment.header["magic"]) != STATS_MAGIC:
        segment.close()
        return None
    return segment


def _forbidden(path: Path) -> str:
    try:
        owner = user_of(path.lstat().st_uid)
    except OSError:
        owner = "another user"
    return f"the relay's counters in {path} belong to {owner}, who alone may read them"


def empty_places() -> Places:
    """Of no rule."""
    return Places(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64))
