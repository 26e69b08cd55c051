"""What the log costs: `python -m tools.bench.logging`, or `make bench-log`.

    compiled   a record from compiled code                               (log_compiled.py)
    python     a call from Python, beside other libraries                (log_python.py)
    drain      records a second into each kind of sink                   (log_drain.py)
    relay      a worker's CPU time a datagram, log off, Info and Debug   (log_relay.py; as root)

All of a part run in turn, the whole round several times; the tables have medians.
"""

from collections.abc import Callable

import click
from rich.console import Console
from rich.table import Table

from tools.bench.log_compiled import bench_compiled
from tools.bench.log_drain import bench_drain
from tools.bench.log_python import bench_python
from tools.bench.log_relay import bench_relay

PARTS: dict[str, Callable[[int, Console], Table]] = {
    "compiled": bench_compiled,
    "python": bench_python,
    "drain": bench_drain,
    "relay": bench_relay,
}


@click.command()
@click.option("--only", type=click.Choice(list(PARTS)), multiple=True, help="A part; repeatable. [default: all]")
@click.option("--rounds", default=5, show_default=True, help="Repetitions.")
def main(only: tuple[str, ...], rounds: int) -> None:
    """Measure writing, draining, and what the relay pays for it."""
    console = Console(width=120)
    for part in only or PARTS:
        console.print(PARTS[part](rounds, console))


if __name__ == "__main__":
    main()
