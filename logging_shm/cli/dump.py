"""`mcrlog dump`: the last records of rings, drained ones included, merged by time. For after a crash."""

import click

from logging_shm.cli.choose import Rings, fail, options

LAST = 100
EPILOG = """\b
Examples:
  mcrlog dump > last-words.txt
  mcrlog dump --last 1000 mcr_dp_c0_ingress
  mcrlog dump --json | jq -r 'select(.severity == "Error").message'
"""


@click.command(epilog=EPILOG)
@click.argument("segments", nargs=-1)
@options
@click.option("--last", type=click.IntRange(1), metavar="N", default=LAST, show_default=True, help="Of each ring.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one object a line.")
def command(
    segments: tuple[str, ...], instance: str | None, facility: str | None, core: int | None, last: int, as_json: bool
) -> None:
    """The last records of every ring or of SEGMENTS, read by a drain or not, merged by time."""
    chosen = Rings(segments, instance, facility, core)
    rings = list(chosen.now())
    if not rings:
        fail(chosen.none())
    from logging_shm.cli.follow import Filter, Follower

    click.echo("".join(Follower(rings, Filter(as_json=as_json), last).present()), nl=False)
    for remark in chosen.remarks():
        click.echo(f"mcrlog: {remark}", err=True)
