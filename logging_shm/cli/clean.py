"""`mcrlog clean`: removes the segments of dead processes, never a living one's, never a file that is no segment."""

import json
import sys
from dataclasses import dataclass, field

import click
import posix_ipc

from logging_shm.cli.choose import STATS, is_forbidden, is_of
from logging_shm.ring import SharedSPSCRingBuffer
from logging_shm.segment import SHM_DIRECTORY, SegmentError, names, open_private, owner_of, unlink, used_by

STATS_MAGIC = b"MCSTATS1"  # relay/dataplane/layout.py; the counters of a worker go with its rings
EPILOG = """\b
Examples:
  mcrlog clean --dry-run
  mcrlog dump > last-words.txt && mcrlog clean

What is half made or damaged is removed when no process has it open. A file that no log made is left alone and named.
"""


@dataclass
class Outcome:
    """What became of the names in /dev/shm."""

    removed: dict[str, int] = field(default_factory=dict)  # and how many unread records went with it
    kept: dict[str, int] = field(default_factory=dict)  # and who uses it
    left_alone: list[str] = field(default_factory=list)  # and why


def is_stats(name: str, uid: int) -> bool:
    """Whether a file holds the counters of a relay's worker."""
    file = open_private(name, uid) if name.endswith(STATS) else None
    if file is None:
        return False
    with file:
        return file.read(len(STATS_MAGIC)) == STATS_MAGIC


def owner(name: str, uid: int) -> int | None:
    """The living process that uses a segment, None when it may go. Raises SegmentError for another's file."""
    return next(iter(used_by(name)), None) if is_stats(name, uid) else owner_of(name, uid)


def unread(name: str) -> int:
    """Records of a segment that nobody has read; 0 for one that can't be read at all."""
    try:
        return SharedSPSCRingBuffer.attach(name, header_only=True).unread()
    except SegmentError:
        return 0


def clean(instance: str | None, dry_run: bool) -> Outcome:
    """Remove what belongs to nobody any more."""
    outcome = Outcome()
    for name in names():
        if not is_of(name, instance):
            continue
        path = SHM_DIRECTORY / name
        try:
            status = path.lstat()
            pid = owner(name, status.st_uid)
            if pid is not None:
                outcome.kept[name] = pid
                continue
            left = unread(name)
            # Not one that got the name meanwhile: a relay that starts makes its segments anew.
            if path.lstat().st_ino == status.st_ino:
                if not dry_run:
                    unlink(name)
                outcome.removed[name] = left
        except FileNotFoundError:
            continue
        except SegmentError as error:
            outcome.left_alone.append(f"{error}: run as its owner or as root" if is_forbidden(error) else str(error))
        except posix_ipc.Error as error:  # of unlink
            outcome.left_alone.append(f"{path}: {error}: run as its owner or as root")
    return outcome


@click.command(epilog=EPILOG)
@click.option("--instance", metavar="NAME", help="Only the segments of the relay of this name. [default: of all]")
@click.option("--dry-run", is_flag=True, help="Tell what would be removed.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one object.")
def command(instance: str | None, dry_run: bool, as_json: bool) -> None:
    """Remove the segments of dead processes. Unread records go with them: `mcrlog dump` first."""
    outcome = clean(instance, dry_run)
    if as_json:
        click.echo(json.dumps(vars(outcome)))
        return
    for name, left in outcome.removed.items():
        loss = f", {left} unread record{'s' if left > 1 else ''}" if left else ""
        click.echo(f"{'would remove' if dry_run else 'removed'} {name}{loss}")
    for reason in outcome.left_alone:
        click.echo(f"left alone: {reason}", err=True)
    click.echo(f"{len(outcome.removed)} {'to remove' if dry_run else 'removed'}, {len(outcome.kept)} in use")
    if outcome.left_alone and not outcome.removed and not outcome.kept:
        sys.exit(1)
