"""How many datagrams a second one worker relays without loss, and what they cost: `make bench`.

    gen ──left── relay ──right── sink

Rates are run in turn, the whole round several times, so that the machine's other load hits all alike. CPU time is
the worker's own (CLOCK_PROCESS_CPUTIME_ID of its process, man 3 clock_getcpuclockid), medians over the rounds.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from tests.system.harness import Relay, receiving, send
from tools.netns import Line

CPUCLOCK_SCHED = 2  # include/linux/posix-timers.h
SECONDS = 3


def cpu_clock(pid: int) -> int:
    """The clock id of a process' CPU time, as clock_getcpuclockid makes it."""
    return (~pid << 3) | CPUCLOCK_SCHED


@dataclass
class Outcome:
    """One run at one rate."""

    sent: int
    lost: int
    achieved_pps: float
    worker_ns: float  # a datagram
    latency_us: float  # median

    @classmethod
    def of(cls, sent: Any, received: Any, worker_cpu_ns: int) -> "Outcome":
        """From the tools' summaries."""
        datagrams = sent["datagrams"]
        latency = received["latency_us"]
        return cls(
            sent=datagrams,
            lost=datagrams - received["datagrams"],
            achieved_pps=sent["packets_per_second"],
            worker_ns=worker_cpu_ns / datagrams,
            latency_us=latency.get("p50", float("nan")),
        )


def run(line: Line, relay: Relay, folder: Path, rate: int, options: tuple[str, ...]) -> Outcome:
    """Send at `rate` for SECONDS; return what came of it."""
    gen, _, sink = line.hosts
    pid = relay.ask("list-workers")[0]["pid"]
    with receiving(sink, folder, "--interface", "left", "--idle-timeout", "1") as summary:
        before_ns = time.clock_gettime_ns(cpu_clock(pid))
        sent = send(gen, "--interface", "right", "--rate", str(rate), "--count", str(rate * SECONDS), *options)
        received = summary()
        return Outcome.of(sent, received, time.clock_gettime_ns(cpu_clock(pid)) - before_ns)


@click.command()
@click.option("--rates", default="50000,100000,300000,600000,1000000", show_default=True, help="Datagrams/s.")
@click.option("--rounds", default=3, show_default=True, help="Repetitions.")
@click.option("--size", default=1316, show_default=True, help="Payload bytes.")
@click.option("--gso/--no-gso", default=True, help="Whether the sender lets the kernel cut its bursts.")
def main(rates: str, rounds: int, size: int, gso: bool) -> None:
    """Measure loss and cost of one worker."""
    wanted = [int(rate) for rate in rates.split(",")]
    options = ("--size", str(size), "--gso" if gso else "--no-gso")
    outcomes: dict[int, list[Outcome]] = {rate: [] for rate in wanted}
    with tempfile.TemporaryDirectory() as name, Line("gen", "relay", "sink") as line:
        folder = Path(name)
        relay = Relay(line.hosts[1], folder, ("left",), 1)
        try:
            relay.add("bench", "239.1.1.1:5001", "239.2.2.2:6001:right")
            for number in range(rounds):
                for rate in wanted:
                    print(f"round {number + 1} of {rounds}, {rate} datagrams/s", file=sys.stderr)
                    outcomes[rate].append(run(line, relay, folder, rate, options))
        finally:
            relay.stop()
    show(outcomes, size, rounds)


def show(outcomes: dict[int, list[Outcome]], size: int, rounds: int) -> None:
    """The table: medians, and the losses of every round."""
    table = Table(title=f"one worker, {size} bytes, {rounds} rounds of {SECONDS} s, medians")
    for column in ("datagrams/s", "achieved", "sent", "lost in each round", "worker ns/datagram", "latency p50 µs"):
        table.add_column(column, justify="right")
    for rate, results in outcomes.items():
        table.add_row(
            f"{rate:,}",
            f"{statistics.median(result.achieved_pps for result in results):,.0f}",
            f"{results[0].sent:,}",
            " ".join(str(result.lost) for result in results),
            f"{statistics.median(result.worker_ns for result in results):,.0f}",
            f"{statistics.median(result.latency_us for result in results):,.1f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
