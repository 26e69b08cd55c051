"""The report on the terminal: one table a part, medians and the spread of the rounds."""

import datetime
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import liburing
import numba
from rich.console import Console
from rich.table import Table

from relay.version import VERSION
from tools.bench.relay.results import FLAT_OUT, Case, Figure, Results, varying
from tools.bench.relay.targets import Verdict

WIDTH = 150
VERSION_COMMANDS = {"smcroute": "smcrouted -v", "nft": "nft --version", "socat": "socat -V"}


def describe_machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*: (.*)", cpuinfo)
    return {
        "pid": os.getpid(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": model[1] if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        "kernel": platform.release(),
        "load_average": os.getloadavg()[0],
        "mcr": VERSION,
        "python": platform.python_version(),
        "numba": numba.__version__,
        "liburing": getattr(liburing, "__version__", "unknown"),
        **{name: version_of(command) for name, command in VERSION_COMMANDS.items()},
    }


def version_of(command: str) -> str:
    """The first version number that a program prints, `missing` when it is not installed."""
    words = command.split()
    if shutil.which(words[0]) is None:
        return "missing"
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    number = re.search(r"\d+\.\d+(\.\d+)*", result.stdout + result.stderr)
    return number[0] if number else "unknown"


def quantity(value: float) -> str:
    """A number in as many digits as it deserves."""
    if value == float("inf"):
        return "∞"
    if abs(value) >= 1e6:
        return f"{value / 1e6:,.2f} M"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:,.3g}" if value else "0"


def spread(metric: str, figure: Figure | None) -> str:
    """Median, and the least and the most where rounds differ."""
    if figure is None:
        return ""
    if metric in ("saturated", "generators_limit"):
        return "yes" if figure.median else "no"
    if metric == "loss" or metric.endswith("_loss"):
        return f"{figure.median:.2%}" if figure.median else "0"
    if figure.least == figure.most:
        return quantity(figure.median)
    return f"{quantity(figure.median)} ({quantity(figure.least)}…{quantity(figure.most)})"


def parameter(case: Case, name: str) -> str:
    """A parameter as a cell."""
    value = getattr(case, name)
    if value is None:
        return ""
    if name == "rate":
        return "flat out" if value == FLAT_OUT else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def part_table(results: Results, part: str, caption: str) -> Table:
    """The table of a part."""
    cases = results.cases(part)
    shown = list(varying(cases))
    fixed = [name for name in cases[0].parameters() if name not in shown]
    title = ", ".join([part, *(f"{name} {parameter(cases[0], name)}" for name in fixed)])
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for name in shown:
        table.add_column(name, justify="left" if name in ("contender", "frames", "idle") else "right")
    metrics = results.metrics(part)
    for metric in metrics:
        table.add_column(metric.replace("_", " "), justify="right")
    for case in cases:
        cells = [spread(metric, results.figures.get((part, case, metric))) for metric in metrics]
        table.add_row(*(parameter(case, name) for name in shown), *cells)
    return table


def targets_table(verdicts: list[Verdict]) -> Table:
    """What was aimed at, and whether it was reached."""
    table = Table(title="targets (medians of this run)", title_justify="left")
    for name in ("target", "measured", "wanted", ""):
        table.add_column(name, justify="left" if name == "target" else "right")
    for verdict in verdicts:
        wanted = "" if verdict.limit is None else f"{'≤' if verdict.at_most else '≥'} {quantity(verdict.limit)}"
        mark = {None: "", True: "[green]pass[/green]", False: "[red]fail[/red]"}[verdict.passed]
        table.add_row(verdict.text, quantity(verdict.value), wanted, mark)
    return table


def show(results: Results, machine: dict[str, Any], verdicts: list[Verdict], captions: dict[str, str]) -> None:
    """Print everything; `captions` says of each part what it measures."""
    console = Console(highlight=False, width=None if Console().is_terminal else WIDTH)
    console.print("  ".join(f"{key} {value}" for key, value in machine.items()))
    for part in results.parts():
        console.print(part_table(results, part, captions[part]))
    if verdicts:
        console.print(targets_table(verdicts))
    for line in results.notes:
        console.print(line)
