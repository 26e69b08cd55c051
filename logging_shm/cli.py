"""mcrlog: look at log rings from a shell, also those of a process that is gone. Never disturbs the writer."""

import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from logging_shm.drain import format_json, format_text
from logging_shm.ring import LogEntry, SharedSPSCRingBuffer
from logging_shm.segment import SegmentError, owner_is_alive

SHM_DIRECTORY = Path("/dev/shm")
LAST_DEFAULT = 100


def rings() -> Iterator[SharedSPSCRingBuffer]:
    """Every log ring of this host that may be read; other shared memory is passed over."""
    for path in sorted(SHM_DIRECTORY.glob("mcr_*")):
        try:
            yield SharedSPSCRingBuffer.attach(path.name)
        except (SegmentError, PermissionError):
            continue


def describe(ring: SharedSPSCRingBuffer) -> dict[str, Any]:
    """What `mcrlog list` tells of a ring."""
    header = ring.segment.header
    return {
        "segment": ring.segment.name,
        "facility": ring.facility.name,
        "core": ring.core,
        "pid": int(header["owner_pid"]),
        "alive": owner_is_alive(ring.segment),
        "level": ring.segment.level.name.lower(),
        "capacity": int(header["capacity"]),
        "written": int(header["write_cursor"]),
        "unread": max(int(header["write_cursor"]) - int(header["read_cursor"]), 0),
        "dropped": int(header["dropped"]),
    }


def with_time(ring: SharedSPSCRingBuffer, entry: LogEntry) -> str:
    """A line with the wall-clock time, core and pid before it."""
    wall_ns = entry.timestamp_ns + int(ring.segment.header["realtime_offset_ns"])
    stamp = datetime.fromtimestamp(wall_ns / 1e9, UTC).isoformat(timespec="microseconds")
    return f"{stamp} core {entry.core} pid {entry.process} {format_text(entry)}"


@click.group(epilog="Example: mcrlog dump mcr_dp_c0_ingress --last 20")
def main() -> None:
    """List and dump shared-memory log rings."""


@main.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_rings(as_json: bool) -> None:
    """The rings of this host, their writers and how full they are."""
    found = [describe(ring) for ring in rings()]
    if as_json:
        click.echo(json.dumps(found))
        return
    if not found:
        click.echo("no log rings in /dev/shm: is a relay running?")
        return
    click.echo(f"{'segment':<36} {'writer':<16} {'level':<8} {'written':>10} {'unread':>8} {'dropped':>8}")
    for ring in found:
        writer = f"{ring['pid']} {'running' if ring['alive'] else 'gone'}"
        click.echo(
            f"{ring['segment']:<36} {writer:<16} {ring['level']:<8} "
            f"{ring['written']:>10} {ring['unread']:>8} {ring['dropped']:>8}"
        )


@main.command("dump")
@click.argument("segment")
@click.option("--last", type=click.IntRange(1), default=LAST_DEFAULT, show_default=True, help="Records.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one object a line.")
def dump(segment: str, last: int, as_json: bool) -> None:
    """The last records of SEGMENT, also those that were read already."""
    try:
        ring = SharedSPSCRingBuffer.attach(segment.removeprefix(f"{SHM_DIRECTORY}/"))
    except (SegmentError, PermissionError) as error:
        click.echo(f"mcrlog: {error}: `mcrlog list` shows the rings there are", err=True)
        sys.exit(1)
    for entry in ring.last(last):
        click.echo(format_json(entry) if as_json else with_time(ring, entry))
