"""`mcrlog list`: every ring, who writes it, and how full it is."""

import json
from typing import Any

import click

from logging_shm.cli import choose
from logging_shm.layout import CORE_NONE
from logging_shm.ring import SharedSPSCRingBuffer


def describe(ring: SharedSPSCRingBuffer) -> dict[str, Any]:
    """What is told of a ring."""
    segment = ring.segment
    return {
        "segment": segment.name,
        "facility": ring.facility.name,
        "core": None if ring.core == CORE_NONE else ring.core,
        "pid": segment.get("process"),
        "alive": segment.writer_is_running(),
        "level": segment.level.name.lower(),
        "mode": "overwrite" if ring.overwrite else "drop",
        "capacity": ring.capacity,
        "written": segment.get("write_cursor"),
        "unread": ring.unread(),
        "dropped": sum(segment.dropped()),
    }


@click.command()
@choose.options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(instance: str | None, facility: str | None, core: int | None, as_json: bool) -> None:
    """The rings of this host, their writers and how full they are."""
    found = [describe(ring) for ring in choose.rings((), instance, facility, core)]
    if as_json:
        click.echo(json.dumps(found))
        return
    if not found:
        click.echo("no log rings in /dev/shm: is a relay running?")
        return
    width = max(len(ring["segment"]) for ring in found)
    click.echo(f"{'segment':<{width}} {'writer':<16} {'level':<8} {'fill':>5} {'written':>10} {'dropped':>8}")
    for ring in found:
        writer = f"{ring['pid']} {'running' if ring['alive'] else 'dead'}"
        fill = f"{ring['unread'] * 100 // ring['capacity']}%"
        click.echo(
            f"{ring['segment']:<{width}} {writer:<16} {ring['level']:<8} {fill:>5} "
            f"{ring['written']:>10} {ring['dropped']:>8}"
        )
