"""The targets of the project, each from figures of one run, mostly as ratios: absolute figures are the machine's. Pure.

A target whose figures were not measured is not judged. Where several rates count, the worst one decides.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from tools.bench.relay.bench import USUAL_SIZE
from tools.bench.relay.results import (
    FLAT_OUT,
    ON_RELAYS_CORE,
    ON_SENDERS_CORE,
    SINGLE,
    SUPER,
    WIRE,
    Case,
    Results,
)

Value = float | None


class Target(NamedTuple):
    """A value with its limit; no limit is for information."""

    text: str
    value: Callable[[Results], Value]
    limit: float | None
    at_most: bool = False


class Verdict(NamedTuple):
    """A target with what was measured."""

    text: str
    value: float
    limit: float | None
    at_most: bool

    @property
    def passed(self) -> bool | None:
        """None without a limit."""
        if self.limit is None:
            return None
        return self.value <= self.limit if self.at_most else self.value >= self.limit


def ratio(value: Value, other: Value) -> Value:
    """The quotient, None where a part of it is missing."""
    return value / other if value is not None and other else None


def worst(values: Iterable[Value]) -> Value:
    """The greatest of those that were measured."""
    return max((value for value in values if value is not None), default=None)


def per_cpu_s(results: Results, contender: str, size: int, frames: str) -> Value:
    """Packets for a second of the worker's CPU time, flat out."""
    return results.get("throughput", Case(contender, size, frames), "out_per_cpu_s")


def lossless(results: Results) -> Value:
    """Highest rate without loss; without end where the generator was the limit."""
    case = Case("mcr", USUAL_SIZE, WIRE)
    if results.get("throughput", case, "generators_limit") == 1.0:
        return float("inf")
    return results.get("throughput", case, "lossless_pps")


def cpu_beside(results: Results, peer: str, contender: str = "mcr") -> Value:
    """CPU per packet beyond the generator's, as a part of a peer's; the worst of the rates from 300 000 on."""
    metric = "beyond_generator_ns"
    rates = [case.rate for case in results.cases("cpu") if case.rate == FLAT_OUT or (case.rate or 0) >= 300_000]
    return worst(
        ratio(
            results.get("cpu", Case(contender, USUAL_SIZE, WIRE, rate), metric),
            results.get("cpu", Case(peer, USUAL_SIZE, WIRE, rate), metric),
        )
        for rate in rates
    )


def latency_beside(
    results: Results, idle: str, peer: str, metric: str, interrupts: str, wanted: Callable[[float], bool]
) -> Value:
    """Latency as a part of a peer's at the worst of the rates wanted."""
    rates = {case.rate for case in results.cases("latency") if case.rate is not None and wanted(case.rate)}
    return worst(
        ratio(
            results.get("latency", Case("mcr", USUAL_SIZE, SINGLE, rate, idle=idle, interrupts=interrupts), metric),
            results.get("latency", Case(peer, USUAL_SIZE, SINGLE, rate, interrupts=interrupts), metric),
        )
        for rate in rates
    )


def core_share(results: Results) -> Value:
    """The part of a core that the adaptive relay uses at low rates."""
    return worst(
        results.get("latency", case, "core_share")
        for case in results.cases("latency")
        if case.contender == "mcr"
        and case.idle == "adaptive"
        and case.interrupts == ON_SENDERS_CORE
        and is_slow(case.rate or 0)
    )


def is_slow(rate: float) -> bool:
    """Rates at which a worker sleeps between packets."""
    return rate <= 2_000


def is_fast(rate: float) -> bool:
    """Rates at which waking for each packet costs too much."""
    return rate >= 20_000


def case_of_streams(count: int) -> Case:
    """The case of the part streams."""
    return Case("mcr", USUAL_SIZE, SINGLE, FLAT_OUT, streams=count)


def of_workers(results: Results) -> Value:
    """What two workers can do, as a multiple of one."""
    by_count = {case.workers: results.get("workers", case, "out_per_cpu_s") for case in results.cases("workers")}
    return ratio(by_count.get(2), by_count.get(1))


def of_rules(results: Results) -> Value:
    """Packets per second of CPU time with 10 000 rules, as a part of those with one."""
    by_count = {case.rules: results.get("rules", case, "out_per_cpu_s") for case in results.cases("rules")}
    return ratio(by_count.get(10_000), by_count.get(1))


def of_memory(results: Results) -> Value:
    """Megabytes that another worker adds."""
    by_count = {case.workers: results.get("memory", case, "total_mb") for case in results.cases("memory")}
    one, two = by_count.get(1), by_count.get(2)
    return two - one if one is not None and two is not None else None


def backlog(results: Results, **parameters: int | str) -> Value:
    """Packets for a second of CPU time with a full ring."""
    for case in results.cases("backlog"):
        if all(getattr(case, name) == value for name, value in parameters.items()):
            return results.get("backlog", case, "out_per_cpu_s")
    return None


def single(results: Results, part: str, metric: str) -> Value:
    """The figure of a part with one case."""
    return next((results.get(part, case, metric) for case in results.cases(part)), None)


def latency_targets() -> list[Target]:
    """Those about latency."""
    made = []
    for interrupts in (ON_SENDERS_CORE, ON_RELAYS_CORE):
        where = f"interrupts on the {interrupts}'s core"

        def beside(
            idle: str, peer: str, metric: str, wanted: Callable[[float], bool], at: str = interrupts
        ) -> Callable[[Results], Value]:
            return lambda results: latency_beside(results, idle, peer, metric, at, wanted)

        for metric in ("p50_us", "p99_us"):
            name = metric.removesuffix("_us")
            text = f"latency {name}, spin / smcroute's at the worst rate, {where}"
            made.append(Target(text, beside("spin", "smcroute", metric, lambda _: True), 1.2, at_most=True))
        for metric, limit in (("p50_us", 0.5), ("p99_us", 1.0)):
            name = metric.removesuffix("_us")
            text = f"latency {name}, adaptive / socat's from 20 000/s on, {where}"
            made.append(Target(text, beside("adaptive", "socat", metric, is_fast), limit, at_most=True))
        for metric in ("p50_us", "p99_us"):
            name = metric.removesuffix("_us")
            text = f"latency {name}, adaptive / socat's up to 2 000/s, {where}"
            made.append(Target(text, beside("adaptive", "socat", metric, is_slow), 1.0, at_most=True))
    made.append(Target("part of a core, adaptive, up to 2 000/s", core_share, 0.1, at_most=True))
    return made


def targets() -> list[Target]:
    """All of them, in the order of the parts."""
    return [
        Target(
            "packets per CPU second of the worker, wire-size frames / one-by-one's",
            lambda r: ratio(per_cpu_s(r, "mcr", USUAL_SIZE, WIRE), per_cpu_s(r, "one-by-one", USUAL_SIZE, WIRE)),
            6,
        ),
        Target(
            "packets per CPU second, ring full, / one-by-one's flat out",
            lambda r: ratio(
                backlog(r, size=USUAL_SIZE, frames=WIRE, outputs=1), per_cpu_s(r, "one-by-one", USUAL_SIZE, WIRE)
            ),
            None,
        ),
        Target(
            "datagrams per CPU second of the worker, super-frames",
            lambda r: per_cpu_s(r, "mcr", USUAL_SIZE, SUPER),
            8e6,
        ),
        Target("highest rate without loss, one worker, wire-size (∞: the generator's limit)", lossless, 1.5e6),
        Target("packets per CPU second, 64 bytes, wire-size", lambda r: per_cpu_s(r, "mcr", 64, WIRE), 1.5e6),
        Target("CPU per packet beyond the generator's / smcroute's", lambda r: cpu_beside(r, "smcroute"), 0.5, True),
        Target("the same, with --exclusive", lambda r: cpu_beside(r, "smcroute", "mcr exclusive"), 0.5, True),
        Target("CPU per packet beyond the generator's / socat's", lambda r: cpu_beside(r, "socat"), 0.1, True),
        Target("CPU per packet beyond the generator's / nft's", lambda r: cpu_beside(r, "nft"), None),
        *latency_targets(),
        Target(
            "datagrams out per CPU second, fan-out 1 to 50",
            lambda r: r.get("fanout", Case("mcr", USUAL_SIZE, WIRE, FLAT_OUT, outputs=50), "out_per_cpu_s"),
            3e6,
        ),
        Target(
            "256 streams in turn / one stream, flat out",
            lambda r: ratio(
                r.get("streams", case_of_streams(256), "out_per_cpu_s"),
                r.get("streams", case_of_streams(1), "out_per_cpu_s"),
            ),
            0.6,
        ),
        Target(
            "256 streams in turn / one stream, ring full",
            lambda r: ratio(backlog(r, streams=256), backlog(r, streams=1, frames=SINGLE)),
            0.6,
        ),
        Target("10 000 rules / one rule", of_rules, 0.95),
        Target("two workers, flows hashed / one, by CPU time, rings full", of_workers, 1.8),
        Target("MB of PSS for another worker, besides its ring", of_memory, 60, True),
        Target("seconds from exec to the first packet", lambda r: single(r, "start", "first_packet_s"), 1.5, True),
        Target("seconds from kill -9 to the next packet", lambda r: single(r, "failover", "next_packet_s"), None),
        Target("lost in a long run at 200 000/s", lambda r: single(r, "endurance", "lost"), 0, True),
        Target("MB that memory grows by in it", lambda r: single(r, "endurance", "grown_mb"), 1, True),
        Target("mcrctl ping, ms", lambda r: single(r, "ping", "wall_ms"), 120, True),
    ]


def judge(results: Results) -> list[Verdict]:
    """A verdict on each target that has figures."""
    verdicts = []
    for target in targets():
        value = target.value(results)
        if value is not None:
            verdicts.append(Verdict(target.text, value, target.limit, target.at_most))
    return verdicts
