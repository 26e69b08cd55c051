"""`mcrlog clean`: removes the segments of dead processes, never a living one's, never a file that is no segment."""

import click

from logging_shm.cli import choose
from logging_shm.ring import SharedSPSCRingBuffer
from logging_shm.segment import SegmentError, names, owner_of, unlink


def unread(name: str) -> int:
    """Records of a segment that nobody has read; 0 for one of another version."""
    try:
        return SharedSPSCRingBuffer.attach(name).unread()
    except SegmentError:
        return 0


@click.command()
@click.option("--instance", metavar="NAME", help="Only this relay's rings.")
@click.option("--dry-run", is_flag=True, help="Tell what would be removed.")
def command(instance: str | None, dry_run: bool) -> None:
    """Remove the rings whose writer and creator are dead. Unread records go with them: `mcrlog dump` first."""
    prefix = f"mcr_{instance}_" if instance else "mcr_"
    removed = kept = 0
    for name in names():
        if not name.startswith(prefix):
            continue
        try:
            pid = owner_of(name)
        except SegmentError as error:
            click.echo(f"left alone: {error}")
            continue
        if pid is not None:
            kept += 1
            continue
        left = unread(name)
        if not dry_run:
            try:
                unlink(name)
            except (PermissionError, OSError) as error:
                choose.fail(f"/dev/shm/{name}: {error}: run as its owner or as root")
        removed += 1
        click.echo(f"{'would remove' if dry_run else 'removed'} {name}" + (f", {left} unread records" if left else ""))
    click.echo(f"{removed} {'to remove' if dry_run else 'removed'}, {kept} in use")
