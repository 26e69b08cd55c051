"""What a datagram costs with ten rules and with ten thousand: `python -m tools.bench.rules`.

One relay takes turns with both rule sets; traffic goes through all of the rules, so that every table is cold where
it would be cold in the field. Medians of the worker's CPU time over the rounds.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from tests.system.harness import Relay, receiving, send
from tools.bench.relay.cpu import cpu_clock
from tools.netns import Line

RATE_PPS = 100_000
SECONDS = 3
FLOWS = 10


def install(relay: Relay, folder: Path, count: int) -> float:
    """Make `count` rules the only ones; return the seconds that installing them took."""
    present = [rule["rule_id"] for rule in relay.ask("list-rules")]
    for at in range(0, len(present), 1000):
        relay.ask("remove-rule", *present[at : at + 1000])
    rules = [(f"r{i}", f"239.1.{i // 250}.{i % 250 + 1}:5001", "239.2.2.2:6001:right") for i in range(count)]
    start_s = time.monotonic()
    relay.add_many(folder, rules)
    return time.monotonic() - start_s


def cost_ns(line: Line, relay: Relay, folder: Path) -> tuple[float, int]:
    """CPU time of the worker for each datagram, and the datagrams lost."""
    gen, _, sink = line.hosts
    pid = relay.ask("list-workers")[0]["pid"]
    flows = ("--group", "239.1.0.1", "--flows", str(FLOWS), "--flow-by", "group")
    count = RATE_PPS * SECONDS
    with receiving(sink, folder, "--interface", "left", "--idle-timeout", "1") as summary:
        before_ns = time.clock_gettime_ns(cpu_clock(pid))
        send(gen, "--interface", "right", "--rate", str(RATE_PPS), "--count", str(count), "--no-gso", *flows)
        received = summary()
    return (time.clock_gettime_ns(cpu_clock(pid)) - before_ns) / count, count - received["datagrams"]


@click.command()
@click.option("--counts", default="10,1000,10000", show_default=True, help="Rules.")
@click.option("--rounds", default=3, show_default=True, help="Repetitions.")
def main(counts: str, rounds: int) -> None:
    """Measure what rules cost."""
    wanted = [int(count) for count in counts.split(",")]
    costs: dict[int, list[float]] = {count: [] for count in wanted}
    installed_s: dict[int, list[float]] = {count: [] for count in wanted}
    lost = dict.fromkeys(wanted, 0)
    with tempfile.TemporaryDirectory() as name, Line("gen", "relay", "sink") as line:
        folder = Path(name)
        relay = Relay(line.hosts[1], folder, ("left",), 1, "--ring-mib", "64")
        try:
            for number in range(rounds):
                for count in wanted:
                    print(f"round {number + 1} of {rounds}, {count} rules", file=sys.stderr)
                    installed_s[count].append(install(relay, folder, count))
                    cost, gone = cost_ns(line, relay, folder)
                    costs[count].append(cost)
                    lost[count] += gone
        finally:
            relay.stop()
    table = Table(title=f"{RATE_PPS:,} datagrams/s sent singly, {rounds} rounds of {SECONDS} s, medians")
    for column in ("rules", "worker ns/datagram", "lost", "installed in s"):
        table.add_column(column, justify="right")
    for count in wanted:
        cells = (
            f"{statistics.median(costs[count]):,.0f}",
            str(lost[count]),
            f"{statistics.median(installed_s[count]):.2f}",
        )
        table.add_row(f"{count:,}", *cells)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
