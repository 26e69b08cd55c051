"""`mcrlog dump`: the last records of rings, drained ones included, merged by time. For after a crash."""

import click

from logging_shm.cli import choose

LAST = 100


@click.command()
@click.argument("segments", nargs=-1)
@choose.options
@click.option("--last", type=click.IntRange(1), default=LAST, show_default=True, help="Records of each ring.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one object a line.")
def command(
    segments: tuple[str, ...], instance: str | None, facility: str | None, core: int | None, last: int, as_json: bool
) -> None:
    """The last records of every ring or of SEGMENTS, read by a drain or not, merged by time."""
    rings = list(choose.rings(segments, instance, facility, core))
    if not rings:
        choose.fail("no log rings: `mcrlog list` shows those there are")
    from logging_shm.cli.follow import Filter, Follower

    for line in Follower(rings, Filter(as_json=as_json), last).present():
        click.echo(line, nl=False)
