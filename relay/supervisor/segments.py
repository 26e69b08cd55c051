"""What a former supervisor left behind when it was killed: found at start, unread records rescued, names removed.

Segments are known by the instance's names, and by what is in them: a file that no relay made is never touched, a living
owner makes a segment untouchable, and what is half made or damaged is removed when nobody has it open. Everything is
judged before anything is removed: a start that is refused has changed nothing.
"""

import contextlib
import os
import re
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import posix_ipc

from logging_shm import Facility, SegmentError, SharedSPSCRingBuffer
from logging_shm.facility import segment_name
from logging_shm.segment import SHM_DIRECTORY, identity_of, is_zero, open_private, owner_of, unlink, used_by
from relay.dataplane.layout import STATS_BYTES, STATS_MAGIC
from relay.errors import PreflightError

STATS = "_stats"
OF_AN_INSTANCE = rf"(supervisor|controlplane|dp_c\d+(_dataplane|_ingress|_egress|_bufferpool|{STATS}))"
ORPHANS_END_S = 3.0  # workers of a killed supervisor drain their rings and end
ORPHANS_POLL_S = 0.02


@dataclass
class Stale:
    """What was left: the names that are removed, and the log rings behind them, still mapped, to be read out."""

    names: list[str] = field(default_factory=list)
    rings: list[SharedSPSCRingBuffer] = field(default_factory=list)
    unread: int = 0  # records that nobody had read when they were found: the drain may be at them by now


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turn what can go wrong when segments are made into a PreflightError, which is shown as one line."""
    try:
        yield
    except SegmentError as error:
        raise PreflightError(str(error)) from error
    except (posix_ipc.Error, OSError) as error:
        raise PreflightError(f"no stats segment in /dev/shm: {error}: make room in /dev/shm") from error


def names_of(instance: str | None) -> list[str]:
    """The segments of an instance that exist."""
    prefix = f"mcr_{re.escape(instance)}_" if instance else "mcr_"
    return sorted(entry.name for entry in SHM_DIRECTORY.iterdir() if re.fullmatch(prefix + OF_AN_INSTANCE, entry.name))


def _stats_owner(name: str, uid: int) -> int | None:
    """The process that has a stats segment open, None when none has. Raises SegmentError for another's file."""
    file = open_private(name, uid)
    if file is None:
        raise SegmentError(f"/dev/shm/{name} is no stats segment: those are files of mode 0600 of the relay's user")
    with file:
        size = os.fstat(file.fileno()).st_size
        magic = file.read(8)
        is_unfinished = size == 0 or (size == STATS_BYTES and not any(magic) and is_zero(file))
    if int.from_bytes(magic, "little") != STATS_MAGIC and not is_unfinished:
        raise SegmentError(f"/dev/shm/{name} is no stats segment")
    return next(iter(used_by(name)), None)


def _owner(name: str, uid: int, orphans: Collection[int] = ()) -> int | None:
    """The pid of the living process that owns a segment, None when there is none, or one of `orphans`.

    Raises PreflightError.
    """
    try:
        pid = _stats_owner(name, uid) if name.endswith(STATS) else owner_of(name, uid)
        return None if pid in orphans else pid
    except SegmentError as error:
        if identity_of(name) is None:  # `mcrlog clean` was faster
            return None
        raise PreflightError(
            f"{str(error).removesuffix(': remove it')}: remove it, or choose another --instance"
        ) from error


def refuse_living(instance: str | None, uid: int = -1) -> None:
    """Raises PreflightError that names the process when a supervisor of this instance lives.

    This process may be the one, before it became another program.
    """
    name = segment_name(Facility.Supervisor, instance=instance)
    if identity_of(name) is not None and (pid := _owner(name, uid, {os.getpid()})) is not None:
        raise PreflightError(_in_use(pid, name))


def _in_use(pid: int, name: str) -> str:
    return f"process {pid} uses /dev/shm/{name}: stop it, or choose another --instance"


def remove_stale(
    instance: str | None,
    uid: int = -1,
    patience_s: float = ORPHANS_END_S,
    orphans: Collection[int] = (),
    adopted: Collection[int] = (),
) -> Stale:
    """Remove the segments that a killed supervisor of this instance left, whose workers ran as `uid`.

    Workers that are taken over, `orphans`, write theirs to their end, `adopted` of them are known by their identities
    without looking who has them open; other workers get `patience_s` to end by themselves.

    Raises PreflightError that names the process when one still uses them, or the file when it is none of a relay's.
    """
    supervisor = segment_name(Facility.Supervisor, instance=instance)
    found = sorted(names_of(instance), key=lambda name: name != supervisor)
    deadline_s = time.monotonic() + patience_s
    judged: dict[str, int | None] = {}
    for name in found:
        judged[name] = identity_of(name)
        while judged[name] not in adopted and (pid := _owner(name, uid, orphans)) is not None:
            if name == supervisor or time.monotonic() > deadline_s:
                raise PreflightError(_in_use(pid, name))
            time.sleep(ORPHANS_POLL_S)
    stale = Stale()
    for name in found:
        with contextlib.suppress(SegmentError):
            ring = SharedSPSCRingBuffer.attach(name, {0, os.geteuid(), uid})
            if not ring.segment.writer_is_running():
                ring.segment.finish_dead()
            stale.rings.append(ring)
            stale.unread += ring.unread()
        if identity_of(name) not in (judged[name], None):
            raise PreflightError(f"/dev/shm/{name} was made just now: another relay of this instance starts")
        unlink(name)
        stale.names.append(name)
    return stale
