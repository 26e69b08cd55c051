"""The command `mcrctl capture`. What it needs takes a moment to import, so it is imported when it is called."""

import os
import sys
from pathlib import Path

import click

from relay import api
from relay.cli.capture.sides import SIDES, find, sides_of
from relay.cli.options import tell_silence
from relay.client import Client
from relay.errors import ControlError, RuleError

NICENESS = 10
SNAPLEN_MAX = 262_144  # libpcap's MAXIMUM_SNAPLEN


@click.argument("rule_id", metavar="RULE")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    required=True,
    metavar="FILE",
    help="A pcapng file; `-` for standard output.",
)
@click.option("--count", type=click.IntRange(1), metavar="N", help="End after N packets.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), metavar="S", help="End after so long.")
@click.option(
    "--snaplen",
    type=click.IntRange(1, SNAPLEN_MAX),
    default=SNAPLEN_MAX,
    metavar="BYTES",
    help="Keep so much of each packet. [default: all]",
)
@click.option("--side", type=click.Choice(SIDES), default="both", help="[default: both]")
@click.pass_obj
def capture(
    socket: Path, rule_id: str, output: Path, count: int | None, seconds: float | None, snaplen: int, side: str
) -> None:
    """Write what arrives for RULE and what leaves by it to a file, until Ctrl-C. The relay notices nothing of it."""
    is_stdout = str(output) == "-"
    if is_stdout and sys.stdout.isatty():
        raise ControlError("packets are no text for a terminal: give a file with -o, or pipe them to `tshark -r -`")
    with Client(socket, on_silence=tell_silence) as client:
        rule = find(client.ask(api.ListRules()).result, rule_id)
        cores = {worker["core"] for worker in client.ask(api.ListWorkers()).result}
    if rule["state"] != "active":
        tell(f"rule {rule_id} is {rule['state']}")
    sides = sides_of(rule, side)
    if not sides:
        raise RuleError(f"rule {rule_id} has no interface on that side")
    from relay.cli.capture.session import Session

    give_way(cores)
    Session(rule_id, sides, snaplen, count, seconds, tell).run(None if is_stdout else output)


def give_way(cores: set[int]) -> None:
    """Stay off the workers' cores where there are others, and let the relay go first where there are not."""
    others = os.sched_getaffinity(0) - cores
    if others:
        os.sched_setaffinity(0, others)
    else:
        os.nice(NICENESS)


def tell(message: str) -> None:
    """A line for the user: packets may be on standard output."""
    click.echo(f"mcrctl: {message}", err=True)
