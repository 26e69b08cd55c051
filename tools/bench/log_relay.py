"""What logging costs the relay: CPU time of a worker a datagram with the log off, at Info, and at Debug.

    gen ──left── relay ──right── sink

One relay, whose level is changed between runs; its log goes to a file, and the traced datagrams in it are counted.
"""

import re
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.system.harness import Relay, receiving, send
from tools.bench.relay.cpu import cpu_ns
from tools.netns import Line

RATE = 300_000
SECONDS = 3
SETTLE_S = 0.5
LEVELS = ("emergency", "info", "debug")


@dataclass
class Run:
    """One run at one level."""

    worker_ns: float  # a datagram
    supervisor_ns: float  # a datagram: the drain is there
    lost: int
    untraced: int  # datagrams without a record of Ingress or Egress, at Debug


def traced(log: Path, start: int) -> tuple[int, int]:
    """The datagrams that records of Ingress and Egress tell of from a place in the log on."""
    with log.open() as file:
        file.seek(start)
        text = file.read()
    received, sent = (re.findall(word + r" (\d+) datagrams", text) for word in ("Received", "Sent"))
    return sum(map(int, received)), sum(map(int, sent))


def wait_until_written(log: Path) -> None:
    """Wait until the log grows no more: then the drain has caught up."""
    size = -1
    while size != (size := log.stat().st_size):
        time.sleep(SETTLE_S)


def run(line: Line, relay: Relay, log: Path, folder: Path, level: str) -> Run:
    """Send at RATE for SECONDS at a level."""
    relay.ask("log-level", "set", level)
    gen, _, sink = line.hosts
    pid = relay.ask("list-workers")[0]["pid"]
    start = log.stat().st_size
    with receiving(sink, folder, "--interface", "left", "--idle-timeout", "1") as summary:
        worker_ns, supervisor_ns = cpu_ns(pid), cpu_ns(relay.pid)
        sent = send(gen, "--interface", "right", "--rate", str(RATE), "--count", str(RATE * SECONDS))["datagrams"]
        received = summary()["datagrams"]
        wait_until_written(log)
        worker_ns, supervisor_ns = cpu_ns(pid) - worker_ns, cpu_ns(relay.pid) - supervisor_ns
    untraced = 2 * sent - sum(traced(log, start)) if level == "debug" else 0
    return Run(worker_ns / sent, supervisor_ns / sent, sent - received, untraced)


def bench_relay(rounds: int, console: Console) -> Table:
    """Run every level in turn."""
    runs: dict[str, list[Run]] = {level: [] for level in LEVELS}
    with tempfile.TemporaryDirectory() as name, Line("gen", "relay", "sink") as line:
        folder, log = Path(name), Path(name) / "mcr.log"
        # The kernel cuts bursts before the cable: the relay gets, and at Debug tells of, every datagram by itself.
        if line.hosts[0].run(["ethtool", "-K", "right", "tx-udp-segmentation", "off"]).returncode:
            console.print("no ethtool: datagrams arrive in bursts, with one record each: apt install ethtool")
        sinks = ("--log-to", f"file:{log}", "--log-to", "stdout:?level=info")
        relay = Relay(line.hosts[1], folder, ("left",), 1, "--ring-mib", "64", *sinks)
        try:
            relay.add("bench", "239.1.1.1:5001", "239.2.2.2:6001:right")
            for number in range(rounds + 1):
                for level in LEVELS:
                    outcome = run(line, relay, log, folder, level)
                    if number:  # the first warms up
                        runs[level].append(outcome)
        finally:
            relay.stop()
    return table(runs, rounds)


def table(runs: dict[str, list[Run]], rounds: int) -> Table:
    """Medians, and what was lost in all rounds."""
    view = Table(
        title=f"relay: {RATE:,} wire-size datagrams/s of 1316 bytes, medians of {rounds} rounds of {SECONDS} s"
    )
    for column in ("level", "worker ns", "beside off", "supervisor ns", "datagrams lost", "records lost"):
        view.add_column(column, justify="left" if column == "level" else "right")
    off = runs[LEVELS[0]]
    for level, results in runs.items():
        # Run by run, as the machine's other load hits neighbours alike.
        ratios = [run.worker_ns / beside.worker_ns - 1 for run, beside in zip(results, off, strict=True)]
        view.add_row(
            {"emergency": "off"}.get(level, level.capitalize()),
            f"{statistics.median(run.worker_ns for run in results):,.0f}",
            f"{statistics.median(ratios):+.1%} ({min(ratios):+.1%} … {max(ratios):+.1%})",
            f"{statistics.median(run.supervisor_ns for run in results):,.0f}",
            str(sum(run.lost for run in results)),
            str(sum(run.untraced for run in results)),
        )
    return view
