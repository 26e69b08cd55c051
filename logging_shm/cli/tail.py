"""`mcrlog tail`: the last lines of rings, and with -f those that come. Any number may watch."""

import errno
import re
import select
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from logging_shm.cli.choose import Rings, fail, options
from logging_shm.cli.moment import Moment
from logging_shm.facility import RING_CAPACITY, SEVERITIES
from logging_shm.ring import SharedSPSCRingBuffer

if TYPE_CHECKING:
    from logging_shm.cli.follow import Follower

LINES = 10
POLL_S = 0.02
LOOK_FOR_RINGS_S = 0.5
STDOUT = 1
EPILOG = """\b
Examples:
  mcrlog tail -f --severity warning
  mcrlog tail -f --facility ingress --core 2 --grep 'rule="?tv'
  mcrlog tail --since 5m --json | jq .message

-f goes on when a relay ends and when it, or another, starts: what then comes is shown.
"""


def pattern(context: click.Context, parameter: click.Parameter, value: str | None) -> re.Pattern[str] | None:
    """A regular expression from the command line."""
    try:
        return None if value is None else re.compile(value)
    except re.error as error:
        raise click.BadParameter(f"{value!r} is no regular expression: {error}") from None


@click.command(epilog=EPILOG)
@click.argument("segments", nargs=-1)
@click.option("-f", "--follow", is_flag=True, help="Go on with what is written from now on; Ctrl-C ends.")
@click.option(
    "-n", "--lines", type=click.IntRange(0), metavar="N", help="Lines to begin with. [default: 10; all with --since]"
)
@options
@click.option(
    "--severity",
    type=click.Choice(list(SEVERITIES), case_sensitive=False),
    metavar="LEVEL",
    default="debug",
    help=f"As grave as this, or graver: {', '.join(SEVERITIES)}.",
)
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
    chosen = Rings(segments, instance, facility, core)
    rings = list(chosen.now())
    if not rings and not (follow and not chosen.forbidden):
        fail(chosen.none())
    for remark in chosen.remarks():
        click.echo(f"mcrlog: {remark}", err=True)
    from logging_shm.cli.follow import Filter, Follower

    wanted = Filter(SEVERITIES[severity], grep, since_ns, as_json)
    follower = Follower(rings, wanted, max(RING_CAPACITY.values()))
    if lines is None and since_ns is None:
        lines = LINES
    try:
        click.echo("".join(deque(follower.present(), maxlen=lines)), nl=False)
        if follow:
            go_on(follower, chosen, {ring.segment.name: ring for ring in rings})
    except KeyboardInterrupt:
        return


def go_on(follower: "Follower", chosen: Rings, known: dict[str, SharedSPSCRingBuffer]) -> None:
    """Show what comes, a batch of whole lines at a time, until nobody reads it."""
    reader_of_ours = select.poll()
    reader_of_ours.register(STDOUT, 0)  # POLLERR and POLLHUP are told unasked
    look_s = 0.0
    while True:
        text = ""
        if time.monotonic() >= look_s:
            look_s = time.monotonic() + LOOK_FOR_RINGS_S
            text = "".join(renew(follower, chosen, known))
        text += "".join(follower.lines(everything=False))
        if text:
            click.echo(text, nl=False)
        elif reader_of_ours.poll(POLL_S * 1000):
            raise BrokenPipeError(errno.EPIPE, "nobody reads")


def renew(follower: "Follower", chosen: Rings, known: dict[str, SharedSPSCRingBuffer]) -> Iterator[str]:
    """Follow rings that came, also in the place of those that went; give the last lines of those."""
    present = {ring.segment.name: ring for ring in chosen.now()}
    gone = [
        ring
        for name, ring in known.items()
        if name not in present or present[name].segment.identity != ring.segment.identity
    ]
    if gone:
        yield from follower.present()
        follower.reader.remove(gone)
        for ring in gone:
            del known[ring.segment.name]
    for name, ring in present.items():
        if name not in known:
            follower.reader.add([ring], ring.capacity)
            known[name] = ring
