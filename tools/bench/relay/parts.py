"""The parts of the benchmark. Each is one round of it: every contender in turn, all figures into Results."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tools.bench.relay.generator import LoadOrder
from tools.bench.relay.peers import MCR, Peer, Running, Setup
from tools.bench.relay.results import FLAT_OUT, SINGLE, SUPER, WIRE, Case, Results, Trial
from tools.bench.relay.search import Point, highest_lossless
from tools.bench.relay.topology import Arena, Run, mtu_for

NOBODY = "nobody"  # the same traffic with no relay: what the generator costs by itself
USUAL_SIZE = 1316


@dataclass(frozen=True)
class Plan:
    """What to measure, and for how long."""

    rounds: int = 3
    seconds: float = 3.0
    confirm_s: float = 10.0
    search_steps: int = 7
    sizes: Sequence[int] = (64, 256, 1316, 1472, 8972)
    streams: Sequence[int] = (1, 16, 256)
    outputs: Sequence[int] = (1, 4, 50)
    rules: Sequence[int] = (1, 1000, 10_000)
    workers: Sequence[int] = (1, 2)
    cpu_rates: Sequence[float] = (100_000, 300_000, FLAT_OUT)
    latency_rates: Sequence[float] = (100, 2_000, 20_000, 100_000)
    idles: Sequence[str] = ("spin", "adaptive", "sleep")
    ring_mib: int = 16
    peers: Sequence[Peer] = ()


@dataclass
class Bench:
    """Where parts run: the plan, the arenas that are open, and the results so far."""

    plan: Plan
    results: Results
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _arenas: dict[int, Arena] = field(default_factory=dict)

    def arena(self, size: int = USUAL_SIZE) -> Arena:
        """The arena for payloads of this size."""
        mtu = mtu_for(size)
        if mtu not in self._arenas:
            self._arenas[mtu] = self._stack.enter_context(Arena(mtu))
        return self._arenas[mtu]

    @contextlib.contextmanager
    def running(self, peer: Peer | None, arena: Arena, **setup: Any) -> Iterator[Running | None]:
        """A contender at work, None in place of one that could not start, with a note. No peer: nothing runs."""
        with contextlib.ExitStack() as stack:
            running = None
            try:
                if peer is None:
                    running = Running()
                else:
                    running = stack.enter_context(peer.running(arena, Setup(ring_mib=self.plan.ring_mib, **setup)))
            except (RuntimeError, AssertionError) as error:
                assert peer is not None
                self.results.note(f"{peer.name} did not start ({setup}): {str(error).splitlines()[0]}")
            yield running

    def close(self) -> None:
        """End all arenas."""
        self._stack.close()


def progress(text: str) -> None:
    """A line for whoever waits."""
    print(f"  {text}", file=sys.stderr, flush=True)


def order(size: int, frames: str, rate: float, seconds: float, streams: int = 1) -> LoadOrder:
    """The generator's order for frames of a kind."""
    return LoadOrder(rate, seconds, size, streams, 1 if frames == SINGLE else 0)


def load(arena: Arena, running: Running, wanted: LoadOrder, frames: str, copies: int = 1) -> Run:
    """One run with a contender."""
    return arena.run(wanted, frames == SUPER, running.pids, running.workers, copies)


def worker_rate(run: Run) -> float | None:
    """Datagrams out for a second of the workers' CPU time, where there is a process to measure."""
    return run.out_per_cpu_s if run.worker_ns else None


def throughput(bench: Bench) -> None:
    """The highest rate without loss, and packets per second of the worker's CPU time."""
    for size in bench.plan.sizes:
        for frames in (WIRE, SUPER):
            peers = bench.plan.peers if size == USUAL_SIZE else ()
            for peer in (MCR, *peers):
                find_highest(bench, peer, size, frames)


def find_highest(bench: Bench, peer: Peer, size: int, frames: str) -> None:
    """The figures of one contender."""
    plan, arena, case = bench.plan, bench.arena(size), Case(peer.name, size, frames)
    progress(f"throughput: {peer.name}, {size} bytes, {frames}")
    flat_out: list[Run] = []
    with bench.running(peer, arena) as running:
        if running is None:
            return

        def attempt(rate: float, seconds: float) -> Point:
            assert running is not None
            run = load(arena, running, order(size, frames, rate, seconds), frames)
            if rate == FLAT_OUT:
                flat_out.append(run)
            bench.results.trials.append(Trial(case, run.achieved_pps, run.loss))
            return Point(run.achieved_pps, run.loss)

        found = highest_lossless(attempt, plan.search_steps, plan.seconds, plan.confirm_s)
    bench.results.add(
        "throughput",
        case,
        lossless_pps=found.pps,
        generators_limit=float(found.is_generators),
        flat_out_pps=flat_out[0].achieved_pps,
        flat_out_loss=flat_out[0].loss,
        out_per_cpu_s=worker_rate(flat_out[0]),
        saturated=float(flat_out[0].saturated),
    )


def cpu(bench: Bench) -> None:
    """CPU time of all processes for each packet, less what the generator takes by itself."""
    arena, plan = bench.arena(), bench.plan
    alone: dict[float, float] = {}
    for peer in (None, MCR, *plan.peers):
        name = peer.name if peer else NOBODY
        progress(f"CPU per packet: {name}")
        with bench.running(peer, arena) as running:
            if running is None:
                continue
            for rate in plan.cpu_rates:
                run = load(arena, running, order(USUAL_SIZE, WIRE, rate, plan.seconds), WIRE)
                case = Case(name, USUAL_SIZE, WIRE, rate)
                if peer is None:
                    alone[rate] = run.other_ns / run.sent
                    bench.results.add("cpu", case, achieved_pps=run.achieved_pps, generator_ns=alone[rate])
                    continue
                beyond_ns = run.relay_ns + run.other_ns - alone[rate] * run.sent
                bench.results.add(
                    "cpu",
                    case,
                    achieved_pps=run.achieved_pps,
                    beyond_generator_ns=beyond_ns / max(run.arrived, 1),
                    worker_ns=sum(run.worker_ns) / max(run.arrived, 1) if run.worker_ns else None,
                    loss=run.loss,
                )


def streams(bench: Bench) -> None:
    """One, some and many streams in turn, each datagram sent by itself."""
    arena, plan = bench.arena(), bench.plan
    progress("streams")
    with bench.running(MCR, arena, rules=max(plan.streams)) as running:
        if running is None:
            return
        for count in plan.streams:
            run = load(arena, running, order(USUAL_SIZE, SINGLE, FLAT_OUT, plan.seconds, count), SINGLE)
            case = Case(MCR.name, USUAL_SIZE, SINGLE, FLAT_OUT, streams=count)
            add_worker_figures(bench, "streams", case, run)


def add_worker_figures(bench: Bench, part: str, case: Case, run: Run) -> None:
    """What every part about one worker tells."""
    bench.results.add(
        part,
        case,
        offered_pps=run.achieved_pps,
        out_per_cpu_s=run.out_per_cpu_s,
        worker_ns=1e9 / max(run.out_per_cpu_s, 1e-9),
        loss=run.loss,
        saturated=float(run.saturated),
    )


def fanout(bench: Bench) -> None:
    """One datagram in, many out."""
    arena, plan = bench.arena(), bench.plan
    for count in plan.outputs:
        progress(f"fan-out 1 to {count}")
        with bench.running(MCR, arena, outputs=count) as running:
            if running is not None:
                run = load(arena, running, order(USUAL_SIZE, WIRE, FLAT_OUT, plan.seconds), WIRE, count)
                add_worker_figures(bench, "fanout", Case(MCR.name, USUAL_SIZE, WIRE, FLAT_OUT, outputs=count), run)


def rules(bench: Bench) -> None:
    """What rules cost that other traffic needs."""
    arena, plan = bench.arena(), bench.plan
    for count in plan.rules:
        progress(f"{count} rules")
        with bench.running(MCR, arena, rules=count) as running:
            if running is not None:
                run = load(arena, running, order(USUAL_SIZE, WIRE, FLAT_OUT, plan.seconds), WIRE)
                add_worker_figures(bench, "rules", Case(MCR.name, USUAL_SIZE, WIRE, FLAT_OUT, rules=count), run)


PARTS: dict[str, Callable[[Bench], None]] = {
    "throughput": throughput,
    "cpu": cpu,
    "streams": streams,
    "fanout": fanout,
    "rules": rules,
}
