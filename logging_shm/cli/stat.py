"""`mcrlog stat`: records and drops a second of each ring, live. Reads cursors only."""

import contextlib
import json
import signal
import sys
import time
from dataclasses import dataclass

import click
from rich.console import Console
from rich.live import Live
from rich.table import Table

from logging_shm.cli.choose import Rings, fail, options
from logging_shm.ring import SharedSPSCRingBuffer

EPILOG = """\b
Examples:
  mcrlog stat --instance tv
  mcrlog stat --json --count 1 --interval-s 5

On a terminal that is too low for all rings the busiest are shown.
"""
LINES_AROUND = 3  # the head, what was left out, and the line in which the cursor stands
TITLES = ("records/s", "drops/s", "fill", "written", "dropped")
PIPE_COLUMNS = 500  # for whatever reads it: nothing is cut
NARROW = 3  # of these, where the terminal is too narrow; `mcrlog list` has the others


@dataclass(frozen=True)
class Sample:
    """A ring's counters at a moment."""

    at_s: float
    written: int
    dropped: int


@dataclass(frozen=True)
class Row:
    """What is shown of a ring."""

    segment: str
    records_per_s: float
    drops_per_s: float
    unread: int
    capacity: int
    written: int
    dropped: int

    def cells(self) -> list[str]:
        """As a table has it."""
        fill = f"{self.unread * 100 // self.capacity}%"
        rates = [f"{self.records_per_s:.0f}", f"{self.drops_per_s:.0f}"]
        return [self.segment, *rates, fill, str(self.written), str(self.dropped)]


class Meter:
    """Looks at rings again and again; a ring made anew under its old name begins anew."""

    def __init__(self, chosen: Rings) -> None:
        self._chosen = chosen
        self._known: dict[str, tuple[SharedSPSCRingBuffer, Sample]] = {}

    def look(self) -> list[Row]:
        """The rings that there are, and their rates since the last look: 0 for those that were not there then."""
        rows = []
        known, self._known = self._known, {}
        for found in self._chosen.now(header_only=True):
            name = found.segment.name
            sample = Sample(time.monotonic(), found.segment.get("write_cursor"), sum(found.segment.dropped()))
            ring, before = known.get(name, (found, sample))
            if ring.segment.identity != found.segment.identity:
                before = sample
            self._known[name] = found, sample
            seconds = sample.at_s - before.at_s or 1.0
            records, drops = (sample.written - before.written) / seconds, (sample.dropped - before.dropped) / seconds
            rows.append(Row(name, records, drops, found.unread(), found.capacity, sample.written, sample.dropped))
        return rows


def table(rows: list[Row], width: int | None, height: int | None) -> Table:
    """A screen of rings, whatever its size; None is as much as is wanted."""
    left_out = 0
    if height is not None and len(rows) > height - LINES_AROUND:
        kept = sorted(rows, key=lambda row: (-row.drops_per_s, -row.records_per_s))[: max(height - LINES_AROUND, 1)]
        left_out = len(rows) - len(kept)
        rows = [row for row in rows if row in kept]
    cells = [["segment", *TITLES], *(row.cells() for row in rows)]
    needed = sum(2 + max(map(len, column)) for column in zip(*cells, strict=True)) - 2
    columns = len(TITLES) if width is None or needed <= width else NARROW
    view = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), caption_justify="left")
    view.add_column("segment", no_wrap=True)
    for title in TITLES[:columns]:
        view.add_column(title, justify="right", no_wrap=True)
    for row in cells[1:]:
        view.add_row(*row[: columns + 1])
    if left_out:
        view.add_row(f"… and {left_out} that are quieter")
    return view


@click.command(epilog=EPILOG)
@click.argument("segments", nargs=-1)
@options
@click.option("--interval-s", type=click.FloatRange(0.1), metavar="S", default=1.0, show_default=True)
@click.option("--count", type=click.IntRange(1), metavar="N", help="End after so many looks. [default: Ctrl-C ends]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one array a look and line.")
def command(
    segments: tuple[str, ...],
    instance: str | None,
    facility: str | None,
    core: int | None,
    interval_s: float,
    count: int | None,
    as_json: bool,
) -> None:
    """Records and drops a second of each ring, like top."""
    chosen = Rings(segments, instance, facility, core)
    meter = Meter(chosen)
    if not meter.look():
        fail(chosen.none())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # or the cursor would stay hidden
    console = Console(highlight=False)
    screen = Live(console=console, auto_refresh=False) if console.is_terminal and not as_json else None
    looks = 0
    with contextlib.suppress(KeyboardInterrupt), screen or contextlib.nullcontext():
        while count is None or looks < count:
            time.sleep(interval_s)
            rows, looks = meter.look(), looks + 1
            if as_json:
                click.echo(json.dumps([vars(row) for row in rows]))
            elif screen is not None:
                screen.update(table(rows, console.width, console.height), refresh=True)
            else:
                Console(width=PIPE_COLUMNS, highlight=False).print(table(rows, None, None))
