"""`mcrlog list`: every ring, whose it is, and how full it is."""

import json
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import click

from logging_shm.cli.choose import Rings, options
from logging_shm.layout import CORE_NONE
from logging_shm.ring import SharedSPSCRingBuffer

EPILOG = """\b
Examples:
  mcrlog list --instance tv
  mcrlog list --json | jq '.[] | select(.dropped > 0)'

The owner is the process that writes, or that made the ring where no writer runs; `dead` when both are gone.
Fill is what the relay's own log has yet to read.
"""


def describe(ring: SharedSPSCRingBuffer) -> dict[str, Any]:
    """What is told of a ring."""
    segment = ring.segment
    writes, is_owned = segment.writer_is_running(), segment.is_owned()
    return {
        "segment": segment.name,
        "facility": ring.facility.name,
        "core": None if ring.core == CORE_NONE else ring.core,
        "pid": segment.get("process"),
        "alive": writes,
        "owner": segment.get("process") if writes else segment.get("creator") if is_owned else None,
        "level": segment.level.name.lower(),
        "mode": "overwrite" if ring.overwrite else "drop",
        "capacity": ring.capacity,
        "written": segment.get("write_cursor"),
        "unread": ring.unread(),
        "dropped": sum(segment.dropped()),
    }


def lay_out(rows: Sequence[Sequence[str]], width: int | None) -> list[str]:
    """Lines of a table whose first row is its head; where `width` is too narrow, names get lines of their own."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" ".join(f"{cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True)) for row in rows]
    if width is None or sum(widths) + len(widths) - 1 <= width:
        return [f"{row[0]:<{widths[0]}} {line}" for row, line in zip(rows, lines, strict=True)]
    return [text for row, line in zip(rows, lines, strict=True) for text in (row[0], f"  {line}")]


@click.command(epilog=EPILOG)
@options
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one array.")
def command(instance: str | None, facility: str | None, core: int | None, as_json: bool) -> None:
    """The rings of this host, their owners and how full they are."""
    rings = Rings((), instance, facility, core)
    found = [describe(ring) for ring in rings.now(header_only=True)]
    if as_json:
        click.echo(json.dumps(found))
    elif found:
        rows = [("segment", "owner", "level", "fill", "written", "dropped")]
        for ring in found:
            owner = f"{ring['pid']} dead" if ring["owner"] is None else f"{ring['owner']} alive"
            fill = f"{ring['unread'] * 100 // ring['capacity']}%"
            rows.append((ring["segment"], owner, ring["level"], fill, str(ring["written"]), str(ring["dropped"])))
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        click.echo("\n".join(lay_out(rows, width)))
    elif not rings.remarks():
        click.echo(rings.none())
    for remark in rings.remarks():
        click.echo(f"mcrlog: {remark}", err=True)
    if not found and rings.forbidden:
        sys.exit(1)
