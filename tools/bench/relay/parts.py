"""The parts of the benchmark. Each is one round of it: every contender in turn, all figures into Results."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

from tests.system.harness import Relay
from tools.bench.relay import lifecycle
from tools.bench.relay.bench import USUAL_SIZE, Bench, progress
from tools.bench.relay.generator import LoadOrder
from tools.bench.relay.peers import MCR, MCR_EXCLUSIVE, Peer, Running
from tools.bench.relay.results import FLAT_OUT, ON_RELAYS_CORE, SINGLE, SUPER, WIRE, Case, Trial
from tools.bench.relay.search import Point, highest_lossless
from tools.bench.relay.topology import Arena, Run

HASHED_STREAMS = 64  # so many that the hash gives each worker its part
SLOTS_PER_MIB = 512  # of the packet ring, 2 KiB each
BACKLOG_S_MAX = 2.0
LATENCY_SAMPLES_MIN = 1000  # a run is longer where the rate is so low
ENDURANCE_PPS = 200_000
NOBODY = "nobody"  # the same traffic with no relay: what the generator costs by itself


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
    """Highest rate without loss; packets per second of the worker's CPU time, which has some left if not saturated."""
    for size in bench.plan.sizes:
        for frames in (WIRE, SUPER):
            peers = bench.plan.peers if size == USUAL_SIZE and frames in bench.plan.peer_frames else ()
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
    for peer in (None, MCR, MCR_EXCLUSIVE, *plan.peers):
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
                    # One that was kept from its core relays nothing, and a packet of it has no price.
                    beyond_generator_ns=beyond_ns / run.arrived if run.loss < 0.98 else None,
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


def workers(bench: Bench) -> None:
    """What workers can do together: the sum of what each relays in a second of its own CPU time, rings full."""
    arena, plan = bench.arena(), bench.plan
    for count in plan.workers:
        progress(f"{count} workers")
        with bench.running(MCR, arena, workers=count, rules=HASHED_STREAMS) as running:
            if running is None or running.relay is None:
                continue
            before = relayed_by_each(running.relay)
            wanted = replace(
                order(USUAL_SIZE, SINGLE, FLAT_OUT, BACKLOG_S_MAX, HASHED_STREAMS), count=full_ring(plan.ring_mib)
            )
            _, used_ns = arena.drain(wanted, running.workers, plan.backlogs)
            relayed = [late - early for late, early in zip(relayed_by_each(running.relay), before, strict=True)]
            bench.results.add(
                "workers",
                Case(MCR.name, USUAL_SIZE, SINGLE, streams=HASHED_STREAMS, workers=count),
                out_per_cpu_s=sum(each * 1e9 / max(ns, 1) for each, ns in zip(relayed, used_ns, strict=True)),
                least_share=min(relayed) / max(sum(relayed), 1),
                loss=1 - sum(relayed) / (wanted.count * plan.backlogs),
            )


def relayed_by_each(relay: Relay) -> list[int]:
    """Datagrams relayed by each worker since its start."""
    return [worker["packets_relayed"] for worker in relay.ask("list-workers")]


def full_ring(ring_mib: int) -> int:
    """Frames that fill three quarters of a packet ring: its room is not what is measured."""
    return ring_mib * SLOTS_PER_MIB * 3 // 4


def latency(bench: Bench) -> None:
    """From before the send to the sink kernel's receive time, for each way of waiting and each peer."""
    contenders: list[tuple[Peer, str | None]] = [(MCR, idle) for idle in bench.plan.idles]
    contenders += [(peer, None) for peer in bench.plan.peers]
    for peer, idle in contenders:
        progress(f"latency: {peer.name} {idle or ''}")
        setup = {"idle": idle} if idle else {}
        with bench.running(peer, bench.arena(), **setup) as running:
            if running is None:
                continue
            for interrupts in bench.plan.interrupts:
                with interrupted(bench.arena(), interrupts == ON_RELAYS_CORE):
                    for rate in bench.plan.latency_rates:
                        case = Case(peer.name, USUAL_SIZE, SINGLE, rate, idle=idle, interrupts=interrupts)
                        measure_latency(bench, running, case)


@contextlib.contextmanager
def interrupted(arena: Arena, relays_core: bool) -> Iterator[None]:
    """In the block, packets are taken in by the relay's core, or by the sender's as always."""
    if relays_core:
        arena.interrupt_relays_core(True)
    try:
        yield
    finally:
        if relays_core:
            arena.interrupt_relays_core(False)


def measure_latency(bench: Bench, running: Running, case: Case) -> None:
    """The figures of one contender at one rate."""
    assert case.rate is not None
    seconds = max(bench.plan.seconds, min(LATENCY_SAMPLES_MIN / case.rate, bench.plan.confirm_s))
    found = bench.arena().probe(case.rate, seconds, USUAL_SIZE, running.output, running.pids)
    bench.results.add(
        "latency",
        case,
        p50_us=found.get("p50"),
        p99_us=found.get("p99"),
        p999_us=found.get("p99.9"),
        max_us=found.get("max"),
        loss=1 - found["received"] / found["sent"],
        core_share=found["core_share"] if running.pids else None,
    )


def backlog(bench: Bench) -> None:
    """Packets per second of CPU time with a full ring: what a worker can do where no generator is fast enough."""
    plan = bench.plan
    for size in plan.sizes:
        with bench.running(MCR, bench.arena(size), rules=max(plan.streams)) as running:
            if running is None:
                continue
            progress(f"full ring: {size} bytes")
            measure_backlog(bench, running, Case(MCR.name, size, WIRE, streams=1, outputs=1))
            if size == USUAL_SIZE:
                for count in plan.streams:
                    measure_backlog(bench, running, Case(MCR.name, size, SINGLE, streams=count, outputs=1))
    for count in plan.outputs:
        if count > 1:
            progress(f"full ring: fan-out 1 to {count}")
            with bench.running(MCR, bench.arena(), outputs=count) as running:
                if running is not None:
                    measure_backlog(bench, running, Case(MCR.name, USUAL_SIZE, WIRE, streams=1, outputs=count))


def measure_backlog(bench: Bench, running: Running, case: Case) -> None:
    """The figures of one case."""
    assert case.size is not None
    assert case.frames is not None
    count = full_ring(bench.plan.ring_mib)
    wanted = replace(order(case.size, case.frames, FLAT_OUT, BACKLOG_S_MAX, case.streams or 1), count=count)
    arena = bench.arena(case.size)
    relayed, (used_ns,) = arena.drain(wanted, running.workers, bench.plan.backlogs)
    expected = count * bench.plan.backlogs * (case.outputs or 1)
    bench.results.add(
        "backlog",
        case,
        out_per_cpu_s=relayed * 1e9 / max(used_ns, 1),
        worker_ns=used_ns / max(relayed, 1),
        loss=1 - relayed / expected,
    )


def endurance(bench: Bench) -> None:
    """Long and steady, once whatever the rounds: what is lost, and what memory grows by after the first tenth."""
    if bench.results.cases("endurance"):
        return
    plan, arena = bench.plan, bench.arena()
    with bench.running(MCR, arena) as running:
        if running is None:
            return
        progress(f"endurance: {plan.endurance_s:.0f} s at {ENDURANCE_PPS} packets/s")
        early = load(arena, running, order(USUAL_SIZE, WIRE, ENDURANCE_PPS, plan.endurance_s * 0.1), WIRE)
        before = {pid: sum(lifecycle.pss_bytes(pid)) for pid in running.pids}
        late = load(arena, running, order(USUAL_SIZE, WIRE, ENDURANCE_PPS, plan.endurance_s * 0.9), WIRE)
        after = {pid: sum(lifecycle.pss_bytes(pid)) for pid in running.pids}
        bench.results.add(
            "endurance",
            Case(MCR.name, USUAL_SIZE, WIRE, ENDURANCE_PPS),
            seconds=early.seconds + late.seconds,
            sent=early.sent + late.sent,
            lost=early.lost + late.lost,
            grown_mb=(sum(after.values()) - sum(before.values())) / 1e6,
            worker_ns=sum(late.worker_ns) / max(late.arrived, 1),
        )


PARTS: dict[str, Callable[[Bench], None]] = {
    "throughput": throughput,
    "cpu": cpu,
    "streams": streams,
    "fanout": fanout,
    "rules": rules,
    "backlog": backlog,
    "workers": workers,
    "latency": latency,
    "memory": lifecycle.memory,
    "start": lifecycle.start,
    "failover": lifecycle.failover,
    "ping": lifecycle.ping,
    "endurance": endurance,
}
