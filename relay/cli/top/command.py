"""The command `mcrctl top`. What it needs takes a second to import, so it is imported when it is called."""

import os
import sys
from pathlib import Path

import click

from relay.errors import ControlError


@click.option("--once", is_flag=True, help="Print one frame with all rules, from two samples, and end.")
@click.option(
    "--interval",
    "interval_s",
    type=click.FloatRange(0.1, 60),
    default=1.0,
    metavar="SECONDS",
    help="Between two samples. [default: 1]",
)
@click.pass_obj
def top(socket: Path, once: bool, interval_s: float) -> None:
    """Watch rules, workers and log live. Reads shared memory, costs the relay nothing; needs root or its user."""
    from relay.cli.top import screen

    if once:
        screen.print_once(socket, interval_s)
        return
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ControlError("top needs a terminal: give --once to print one frame")
    if os.environ.get("TERM", "dumb") == "dumb":
        raise ControlError("top needs a terminal that can move its cursor, and TERM says dumb: give --once")
    screen.run(socket, interval_s)
