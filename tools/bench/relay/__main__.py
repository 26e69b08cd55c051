"""The benchmark from the command line: reads options, runs the rounds, prints, writes. See the package's docstring."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from tools.bench.relay import plots, report, targets
from tools.bench.relay.bench import Bench, Plan
from tools.bench.relay.parts import PARTS
from tools.bench.relay.peers import PEERS, Peer
from tools.bench.relay.results import FLAT_OUT, ON_SENDERS_CORE, WIRE, Results

PROGRAMS = {"ip": "iproute2", "nft": "nftables", "ethtool": "ethtool", "taskset": "util-linux"}
IDLES = ("spin", "adaptive", "sleep")
QUICK = Plan(
    rounds=1,
    seconds=0.5,
    confirm_s=0.8,
    search_steps=4,
    sizes=(64, 1316),
    cpu_rates=(300_000, FLAT_OUT),
    latency_rates=(2_000, 20_000),
    interrupts=(ON_SENDERS_CORE,),
    backlogs=5,
    endurance_s=5.0,
    peer_frames=(WIRE,),
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


def check_programs() -> None:
    """What every part uses. Raises UsageError."""
    for program, package in PROGRAMS.items():
        if shutil.which(program) is None:
            raise click.UsageError(f"{program} is not installed: apt-get install {package}")


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
@click.option("--streams", help="Streams of the part streams.  [default: 1,16,256]")
@click.option("--outputs", help="Outputs of the part fanout.  [default: 1,4,50]")
@click.option("--rules", help="Rules of the part rules.  [default: 1,1000,10000]")
@click.option("--workers", help="Workers of the parts workers and memory.  [default: 1,2]")
@click.option("--latency-rates", help="Datagrams/s of the part latency.  [default: 100,2000,20000,100000]")
@click.option("--idles", help="The relay's ways of waiting in the part latency.  [default: spin,adaptive,sleep]")
@click.option("--rounds", type=click.IntRange(1), help="Repetitions of everything, interleaved.  [default: 3]")
@click.option("--seconds", type=click.FloatRange(0.05), help="Length of a run.  [default: 3]")
@click.option("--confirm-seconds", type=click.FloatRange(0.05), help="Length of a search's last run.  [default: 10]")
@click.option("--endurance-seconds", type=click.FloatRange(1), help="Length of the part endurance.  [default: 600]")
@click.option("--ring-mib", type=click.IntRange(1, 1024), help="The relay's packet ring.  [default: 16]")
@click.option("--cut-egress", is_flag=True, help="Cut the relay's output as for a NIC without segmentation offload.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="FILE", help="Write all figures here.")
@click.option("--plots", "plots_path", type=click.Path(path_type=Path), metavar="DIR", help="Draw plots into here.")
def main(
    quick: bool,
    only: str,
    peers: str,
    rounds: int | None,
    seconds: float | None,
    confirm_seconds: float | None,
    endurance_seconds: float | None,
    ring_mib: int | None,
    cut_egress: bool,
    json_path: Path | None,
    plots_path: Path | None,
    idles: str | None,
    **lists: str | None,
) -> None:
    """Measure the relay beside its peers, in network namespaces of its own (as root)."""
    if os.geteuid() != 0:
        raise click.UsageError("network namespaces need root: run it with sudo")
    check_programs()
    results = Results()
    parts = words(only, list(PARTS), "--only")
    given: dict[str, Any] = {
        "peers": present(words(peers, list(PEERS), "--peers"), results),
        **{name: numbers(text) for name, text in lists.items() if text},
        "idles": words(idles, IDLES, "--idles") if idles else None,
        "rounds": rounds,
        "seconds": seconds,
        "confirm_s": confirm_seconds,
        "endurance_s": endurance_seconds,
        "ring_mib": ring_mib,
        "cut_egress": cut_egress,
    }
    plan = dataclasses.replace(QUICK if quick else Plan(), **{k: v for k, v in given.items() if v is not None})
    machine = report.describe_machine()
    run(Bench(plan, results), parts)
    verdicts = targets.judge(results)
    report.show(results, machine, verdicts, {name: part.__doc__ or "" for name, part in PARTS.items()})
    if json_path is not None:
        json_path.write_text(json.dumps(document(machine, results, verdicts), indent=1))
    if plots_path is not None:
        for line in plots.draw(results, plots_path):
            click.echo(line, err=True)


def document(machine: dict[str, Any], results: Results, verdicts: Sequence[targets.Verdict]) -> dict[str, Any]:
    """Everything, for --json."""
    judged = [{**verdict._asdict(), "passed": verdict.passed} for verdict in verdicts]
    return {
        "machine": machine,
        "figures": results.as_json(),
        "trials": results.trials_as_json(),
        "targets": [{**verdict, "value": finite(verdict["value"])} for verdict in judged],
        "notes": results.notes,
    }


def finite(value: float) -> float | None:
    """JSON has no infinity: the generator's limit is null."""
    return value if value != float("inf") else None


def run(bench: Bench, parts: Sequence[str]) -> None:
    """All rounds; Ctrl-C ends them, and what was measured so far is reported."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
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
