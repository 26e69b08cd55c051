"""`mcrlog stat`: records and drops a second of each ring, live. Reads cursors only."""

import time
from collections.abc import Sequence

import click
from rich.console import Console
from rich.live import Live
from rich.table import Table

from logging_shm.cli import choose
from logging_shm.ring import SharedSPSCRingBuffer

Sample = tuple[int, int]  # written, dropped


def sample(ring: SharedSPSCRingBuffer) -> Sample:
    """A ring's counters now."""
    return ring.segment.get("write_cursor"), sum(ring.segment.dropped())


def table(
    rings: Sequence[SharedSPSCRingBuffer], before: Sequence[Sample], after: Sequence[Sample], seconds: float
) -> Table:
    """What changed between two samples."""
    view = Table(box=None, pad_edge=False)
    view.add_column("segment", no_wrap=True)
    for title in ("records/s", "drops/s", "fill", "written", "dropped"):
        view.add_column(title, justify="right")
    for ring, old, new in zip(rings, before, after, strict=True):
        view.add_row(
            ring.segment.name,
            f"{(new[0] - old[0]) / seconds:.0f}",
            f"{(new[1] - old[1]) / seconds:.0f}",
            f"{ring.unread() * 100 // ring.capacity}%",
            str(new[0]),
            str(new[1]),
        )
    return view


@click.command()
@click.argument("segments", nargs=-1)
@choose.options
@click.option("--interval-s", type=click.FloatRange(0.1), default=1.0, show_default=True, help="Between two looks.")
@click.option("--count", type=click.IntRange(1), help="End after so many looks. [default: Ctrl-C ends]")
def command(
    segments: tuple[str, ...],
    instance: str | None,
    facility: str | None,
    core: int | None,
    interval_s: float,
    count: int | None,
) -> None:
    """Records and drops a second of each ring, like top."""
    rings = list(choose.rings(segments, instance, facility, core))
    if not rings:
        choose.fail("no log rings: is a relay running?")
    before, since_s = [sample(ring) for ring in rings], time.monotonic()
    console = Console()
    looks = 0
    with Live(console=console, auto_refresh=False) as live:
        try:
            while count is None or looks < count:
                time.sleep(interval_s)
                after, now_s = [sample(ring) for ring in rings], time.monotonic()
                view = table(rings, before, after, now_s - since_s)
                before, since_s, looks = after, now_s, looks + 1
                if console.is_terminal:
                    live.update(view, refresh=True)
                else:
                    console.print(view)
        except KeyboardInterrupt:
            return
