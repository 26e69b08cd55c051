"""Plots of a run as SVG: latency percentiles, and loss against rate. Needs matplotlib; without it a line says so."""

import importlib
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tools.bench.relay.results import ON_RELAYS_CORE, ON_SENDERS_CORE, Case, Results

INSTALL = "plots need matplotlib: .venv/bin/pip install matplotlib"
PERCENTILES = {"p50_us": "-", "p99_us": "--", "p999_us": ":"}
SIZE_INCHES = (9, 5.5)


def draw(results: Results, folder: Path) -> Iterator[str]:
    """Draw what was measured into `folder`; yields a line about each file, or why there is none."""
    if find_spec("matplotlib") is None:
        yield INSTALL
        return
    importlib.import_module("matplotlib").use("svg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    folder.mkdir(parents=True, exist_ok=True)
    for interrupts in (ON_SENDERS_CORE, ON_RELAYS_CORE):
        cases = [case for case in results.cases("latency") if case.interrupts == interrupts]
        if cases:
            figure = latency_figure(pyplot, results, cases, interrupts)
            yield save(pyplot, figure, folder / f"latency-interrupts-on-{interrupts}s-core.svg")
    for frames in sorted({trial.case.frames or "" for trial in results.trials}):
        yield save(pyplot, loss_figure(pyplot, results, frames), folder / f"loss-{frames}.svg")


def save(pyplot: Any, figure: Any, path: Path) -> str:
    """Write a figure."""
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)
    return f"wrote {path}"


def latency_figure(pyplot: Any, results: Results, cases: list[Case], interrupts: str) -> Any:
    """Percentiles by rate, a colour for each contender, a line style for each percentile."""
    figure, axes = pyplot.subplots(figsize=SIZE_INCHES)
    names = dict.fromkeys((case.contender, case.idle) for case in cases)
    for number, (contender, idle) in enumerate(names):
        own = sorted((c for c in cases if (c.contender, c.idle) == (contender, idle)), key=lambda c: c.rate or 0)
        for metric, style in PERCENTILES.items():
            points = [(case.rate, results.get("latency", case, metric)) for case in own]
            known = [(rate, value) for rate, value in points if value is not None]
            label = f"{contender} {idle or ''}" if metric == "p50_us" else None
            axes.plot(*zip(*known, strict=True), style, color=f"C{number}", marker=".", label=label)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="datagrams/s",
        ylabel="µs to the sink's kernel",
        title=f"latency p50 —, p99 - -, p99.9 ···; interrupts on the {interrupts}'s core",
    )
    return finish(figure, axes)


def loss_figure(pyplot: Any, results: Results, frames: str) -> Any:
    """Every trial of the searches: what was offered, and which part of it was lost."""
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for trial in results.trials:
        if trial.case.frames == frames:
            points[f"{trial.case.contender}, {trial.case.size} bytes"].append((trial.pps, trial.loss * 100))
    figure, axes = pyplot.subplots(figsize=SIZE_INCHES)
    for name, known in points.items():
        axes.plot(*zip(*sorted(known), strict=True), marker=".", label=name)
    axes.set(xscale="log", xlabel="datagrams/s offered", ylabel="% lost", title=f"loss against rate, {frames} frames")
    return finish(figure, axes)


def finish(figure: Any, axes: Any) -> Any:
    """Grid and legend."""
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(fontsize="small")
    return figure
