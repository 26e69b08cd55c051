"""`mcrlog tail`: the last lines of rings, and with -f those that come. Any number may watch."""

import re
import time
from collections import deque

import click

from logging_shm.cli import choose
from logging_shm.cli.follow import Filter, Follower, Moment
from logging_shm.facility import RING_CAPACITY, Severity
from logging_shm.ring import SharedSPSCRingBuffer

LINES = 10
POLL_S = 0.02
LOOK_FOR_RINGS_S = 0.5
SEVERITIES = [severity.name.lower() for severity in Severity]


def pattern(context: click.Context, parameter: click.Parameter, value: str | None) -> re.Pattern[str] | None:
    """A regular expression from the command line."""
    try:
        return None if value is None else re.compile(value)
    except re.error as error:
        raise click.BadParameter(f"{value!r} is no regular expression: {error}") from None


@click.command(epilog='Example: mcrlog tail -f --severity warning --grep "rule=.tv" --since 5m')
@click.argument("segments", nargs=-1)
@click.option("-f", "--follow", is_flag=True, help="Go on with what is written from now on; Ctrl-C ends.")
@click.option("-n", "--lines", type=click.IntRange(0), help="Lines to begin with. [default: 10; all with --since]")
@choose.options
@click.option("--severity", type=click.Choice(SEVERITIES), default="debug", help="As grave as this, or graver.")
@click.option("--grep", metavar="REGEX", callback=pattern, help="Only lines in which this is found.")
@click.option("--since", "since_ns", type=Moment(), metavar="TIME", help="Such as 30s, 5m, or 2026-11-24T17:00:00.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one object a line.")
def command(
    segments: tuple[str, ...],
    follow: bool,
    lines: int | None,
    instance: str | None,
    facility: str | None,
    core: int | None,
    severity: str,
    grep: re.Pattern[str] | None,
    since_ns: int | None,
    as_json: bool,
) -> None:
    """The last lines of every ring or of SEGMENTS, merged by time, with time, core, pid and pairs."""
    rings = list(choose.rings(segments, instance, facility, core))
    if not rings and not follow:
        choose.fail("no log rings: `mcrlog list` shows those there are")
    wanted = Filter(Severity[severity.capitalize()], grep, since_ns, as_json)
    follower = Follower(rings, wanted, max(RING_CAPACITY.values()))
    if lines is None and since_ns is None:
        lines = LINES
    for line in deque(follower.present(), maxlen=lines):
        click.echo(line, nl=False)
    known = {ring.segment.name: ring for ring in rings}
    look_s = 0.0
    try:
        while follow:
            if time.monotonic() >= look_s:
                look_s = time.monotonic() + LOOK_FOR_RINGS_S
                if not segments:
                    renew(follower, known, instance, facility, core)
            shown = False
            for line in follower.lines(everything=False):
                click.echo(line, nl=False)
                shown = True
            if not shown:
                time.sleep(POLL_S)
    except KeyboardInterrupt:
        return


def renew(
    follower: Follower,
    known: dict[str, SharedSPSCRingBuffer],
    instance: str | None,
    facility: str | None,
    core: int | None,
) -> None:
    """Follow rings that came, also in the place of those that went: a relay was started again."""
    present = {ring.segment.name: ring for ring in choose.rings((), instance, facility, core)}
    for name, ring in list(known.items()):
        if name not in present or present[name].segment.identity != ring.segment.identity:
            follower.reader.remove([ring])
            del known[name]
    for name, ring in present.items():
        if name not in known:
            follower.reader.add([ring], ring.capacity)
            known[name] = ring
