"""The benchmark from the command line: reads options, runs the rounds, prints, writes. See the package's docstring."""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from tools.bench.relay import report
from tools.bench.relay.bench import Bench, Plan
from tools.bench.relay.parts import PARTS
from tools.bench.relay.peers import PEERS, Peer
from tools.bench.relay.results import FLAT_OUT, Results

QUICK = Plan(
    rounds=1,
    seconds=0.6,
    confirm_s=1.0,
    search_steps=4,
    sizes=(64, 1316),
    cpu_rates=(300_000, FLAT_OUT),
    latency_rates=(2_000, 20_000),
)


def words(text: str, allowed: Sequence[str], what: str) -> list[str]:
    """A list such as `a,b` of allowed words; `none` is the empty one."""
    if text == "none":
        return []
    chosen = text.split(",")
    for word in chosen:
        if word not in allowed:
            raise click.UsageError(f"{what} {word}: choose from {', '.join(allowed)}")
    return chosen


def numbers(text: str) -> tuple[int, ...]:
    """A list such as `64,1316`."""
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise click.UsageError(f"{text}: expected whole numbers with commas between them") from None


def present(names: Sequence[str], results: Results) -> list[Peer]:
    """The peers that are installed; a note for each of the others."""
    chosen = [PEERS[name] for name in names]
    for peer in chosen:
        if line := peer.missing():
            results.note(line)
            click.echo(line, err=True)
    return [peer for peer in chosen if peer.missing() is None]


@click.command(epilog='Example: make bench ARGS="--quick", or --only latency --rounds 5 --plots plots')
@click.option("--quick", is_flag=True, help="Everything, roughly, in two minutes.")
@click.option("--only", default=",".join(PARTS), show_default=True, help="Parts.")
@click.option("--peers", default=",".join(PEERS), show_default=True, help="Whom to compare with, or none.")
@click.option("--sizes", help="Payload bytes.  [default: 64,256,1316,1472,8972]")
@click.option("--rounds", type=click.IntRange(1), help="Repetitions of everything, interleaved.  [default: 3]")
@click.option("--seconds", type=click.FloatRange(0.05), help="Length of a run.  [default: 3]")
@click.option("--confirm-seconds", type=click.FloatRange(0.05), help="Length of a search's last run.  [default: 10]")
@click.option("--ring-mib", type=click.IntRange(1, 1024), help="The relay's packet ring.  [default: 16]")
@click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="FILE", help="Write all figures here.")
@click.option("--plots", "plots_path", type=click.Path(path_type=Path), metavar="DIR", help="Draw plots into here.")
def main(
    quick: bool,
    only: str,
    peers: str,
    sizes: str | None,
    rounds: int | None,
    seconds: float | None,
    confirm_seconds: float | None,
    ring_mib: int | None,
    json_path: Path | None,
    plots_path: Path | None,
) -> None:
    """Measure the relay beside its peers, in network namespaces of its own (as root)."""
    if os.geteuid() != 0:
        raise click.UsageError("network namespaces need root: run it with sudo")
    results = Results()
    parts = words(only, list(PARTS), "--only")
    given: dict[str, Any] = {
        "peers": present(words(peers, list(PEERS), "--peers"), results),
        "sizes": numbers(sizes) if sizes else None,
        "rounds": rounds,
        "seconds": seconds,
        "confirm_s": confirm_seconds,
        "ring_mib": ring_mib,
    }
    plan = dataclasses.replace(QUICK if quick else Plan(), **{k: v for k, v in given.items() if v is not None})
    machine = report.describe_machine()
    run(Bench(plan, results), parts)
    report.show(results, machine)
    if json_path is not None:
        json_path.write_text(
            json.dumps(
                {
                    "machine": machine,
                    "figures": results.as_json(),
                    "trials": results.trials_as_json(),
                    "notes": results.notes,
                },
                indent=1,
            )
        )


def run(bench: Bench, parts: Sequence[str]) -> None:
    """All rounds; Ctrl-C ends them, and what was measured so far is reported."""
    with contextlib.closing(bench):
        try:
            for number in range(bench.plan.rounds):
                print(f"round {number + 1} of {bench.plan.rounds}", file=sys.stderr, flush=True)
                for part in parts:
                    PARTS[part](bench)
        except KeyboardInterrupt:
            bench.results.note("interrupted: these are the figures until then")


if __name__ == "__main__":
    main()
