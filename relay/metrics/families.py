"""The table of metrics: name, meaning, unit, labels, and the numbers in the relay's statistics. Pure.

A new metric is a row here, in the tuple of what it describes; collector, alerts, dashboard and tests take their names
from FAMILIES. Samples of a histogram are pairs of cumulative (upper bound, count) buckets and the sum.

Numbers that add up over labels are given once, in the smallest part: a worker, a rule, an output. Sums of outputs are
left to queries, because a rule that loses an output would let its sum go back. For the same reason no total is built
from rules: those that are removed take their counts with them. Faults of streams are not summed up here from the
streams of the moment, which come and go: the relay keeps totals that never go back (relay/supervisor/stream_totals.py).
"""

import errno
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily

from relay.health import StreamHealth
from relay.messages import LATENCY_BOUNDS_NS, RuleStats, Stats, WorkerStats
from relay.protection import LEG_NAMES, LegHealth, ProtectionHealth

RULES_MAX = 10_000  # with series of their own; a scrape of these takes a second of this process
OUTPUTS_MAX = 20_000
SOURCE_SILENT_MS = 60_000  # a source that was silent for longer has ended
ERRNO_PREFIX = "send_error_errno_"  # of a cause in `drops`, relay/supervisor/sampling.py

Buckets = tuple[Sequence[tuple[str, float]], float]  # upper bounds as text, "+Inf" last, with counts; and the sum
Samples = Iterable[tuple[tuple[str, ...], Any]]  # label values and a number, or Buckets for a histogram
Metric = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily | InfoMetricFamily


@dataclass(frozen=True)
class Family:
    """A metric. `name` is without the unit and without `_total`: those are added as the format wants them."""

    kind: Literal["counter", "gauge", "histogram"]
    name: str
    unit: str
    help: str
    labels: tuple[str, ...]
    samples: Callable[[Stats], Samples]

    def empty(self) -> Any:
        """The metric without samples."""
        kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
        return kinds[self.kind](self.name, self.help, labels=self.labels, unit=self.unit)

    def fill(self, stats: Stats) -> Any:
        """The metric with its samples."""
        metric = self.empty()
        for labels, value in self.samples(stats):
            if self.kind == "histogram":
                metric.add_metric(labels, *value)
            else:
                metric.add_metric(labels, value)
        return metric

    def exposed(self) -> list[str]:
        """The names of its series."""
        name = f"{self.name}_{self.unit}" if self.unit else self.name
        endings = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_count", "_sum"]}
        return [name + ending for ending in endings[self.kind]]


def _of_relay(value: Callable[[Stats], float]) -> Callable[[Stats], Samples]:
    return lambda stats: [((), value(stats))]


def _of_workers(value: Callable[[WorkerStats], float]) -> Callable[[Stats], Samples]:
    return lambda stats: [((str(worker.core),), value(worker)) for worker in stats.workers]


def _of_rules(value: Callable[[RuleStats], float | None]) -> Callable[[Stats], Samples]:
    """Rules for which there is no value yet have no sample."""
    return lambda stats: [((rule.rule_id,), number) for rule in stats.rules if (number := value(rule)) is not None]


def _worker_drops(stats: Stats) -> Samples:
    for worker in stats.workers:
        for cause, count in worker.drops.items():
            if not cause.startswith(ERRNO_PREFIX):
                yield (str(worker.core), cause), count


def _send_errors(stats: Stats) -> Samples:
    for worker in stats.workers:
        for cause, count in worker.drops.items():
            if cause.startswith(ERRNO_PREFIX):
                number = int(cause.removeprefix(ERRNO_PREFIX))
                yield (str(worker.core), errno.errorcode.get(number, str(number))), count


def _ring_fills(stats: Stats) -> Samples:
    for worker in stats.workers:
        for interface, percent in worker.ring_fill_percent.items():
            yield (str(worker.core), interface), percent / 100


def _rule_states(stats: Stats) -> Samples:
    active = sum(rule.state == "active" for rule in stats.rules)
    return [(("active",), active), (("waiting",), len(stats.rules) - active)]


def _rule_drops(stats: Stats) -> Samples:
    return [((rule.rule_id, cause), number) for rule in stats.rules for cause, number in rule.drops.items()]


def _outputs(stats: Stats) -> Iterator[tuple[tuple[str, str], Any]]:
    for rule in stats.rules:
        for output in rule.outputs:
            yield (rule.rule_id, output.output), output


def _output_drops(stats: Stats) -> Samples:
    for labels, output in _outputs(stats):
        for cause, count in output.drops.items():
            yield (*labels, cause), count


def _latencies(stats: Stats) -> Iterator[tuple[tuple[str], Buckets]]:
    for worker in stats.workers:
        latency = worker.latency
        if latency is not None and latency.at_most:  # an older relay tells none
            bounds = [str(bound_ns / 1e9) for bound_ns in LATENCY_BOUNDS_NS]
            buckets = [*zip(bounds, latency.at_most, strict=True), ("+Inf", latency.datagrams)]
            yield (str(worker.core),), (buckets, latency.sum_us / 1e6)


def _sources(rule: RuleStats) -> list[StreamHealth]:
    """The streams that are not over."""
    return [stream for stream in rule.streams if stream.silent_ms < SOURCE_SILENT_MS]


def _source_count(rule: RuleStats) -> int:
    """A source may be with several workers (--fanout cpu)."""
    return len({(stream.source, stream.interface) for stream in _sources(rule)})


def _jitter_s(rule: RuleStats) -> float | None:
    return max((stream.rtp.jitter_us / 1e6 for stream in _sources(rule) if stream.rtp is not None), default=None)


def _of_rtp(name: str) -> Callable[[Stats], Samples]:
    return _of_rules(lambda rule: getattr(rule.rtp, name) if rule.rtp is not None else None)


def _of_mpeg_ts(name: str) -> Callable[[Stats], Samples]:
    return _of_rules(lambda rule: getattr(rule.mpeg_ts, name) if rule.mpeg_ts is not None else None)


def _of_legs(value: Callable[[LegHealth], float | None]) -> Callable[[Stats], Samples]:
    """Both legs of each protected rule, but for those without a value."""
    return lambda stats: [
        ((rule.rule_id, name), number)
        for rule in stats.rules
        if rule.protection is not None
        for name, leg in zip(LEG_NAMES, rule.protection.legs, strict=False)
        if (number := value(leg)) is not None
    ]


def _of_protection(value: Callable[[ProtectionHealth], float | None]) -> Callable[[Stats], Samples]:
    return _of_rules(lambda rule: value(rule.protection) if rule.protection is not None else None)


WORKER, RULE, OUTPUT = ("core",), ("rule",), ("rule", "output")

OF_THE_RELAY = (
    Family("gauge", "mcr_uptime", "seconds", "Time since the supervisor started.", (), _of_relay(lambda s: s.uptime_s)),
    Family("gauge", "mcr_rules", "", "Rules by state; one that waits relays nothing yet.", ("state",), _rule_states),
)
OF_WORKERS = (
    Family(
        *("gauge", "mcr_worker_running", "", "Whether the worker of this core runs.", WORKER),
        _of_workers(lambda worker: worker.state == "running"),
    ),
    Family(
        *("counter", "mcr_worker_restarts", "", "Processes that ended although nobody told them to.", WORKER),
        _of_workers(lambda worker: worker.restarts),
    ),
    Family(
        *("counter", "mcr_worker_received", "packets", "Datagrams that the packet rings gave to a worker.", WORKER),
        _of_workers(lambda worker: worker.packets_in),
    ),
    Family(
        *("counter", "mcr_worker_received", "bytes", "Payload of received datagrams.", WORKER),
        _of_workers(lambda worker: worker.bytes_in),
    ),
    Family(
        *("counter", "mcr_worker_matched", "packets", "Received datagrams that some rule asks for.", WORKER),
        _of_workers(lambda worker: worker.packets_matched),
    ),
    Family(
        *("counter", "mcr_worker_relayed", "packets", "Datagrams handed to the kernel, one for each output.", WORKER),
        _of_workers(lambda worker: worker.packets_relayed),
    ),
    Family(
        *("counter", "mcr_worker_relayed", "bytes", "Payload of relayed datagrams.", WORKER),
        _of_workers(lambda worker: worker.bytes_relayed),
    ),
    Family(
        *("counter", "mcr_worker_drops", "", "Datagrams that did not leave, by cause; frames for ring_full."),
        *((*WORKER, "cause"), _worker_drops),
    ),
    Family(
        *("counter", "mcr_worker_send_errors", "", "Drops of cause send_error, by errno.", (*WORKER, "errno")),
        _send_errors,
    ),
    Family(
        *("gauge", "mcr_worker_ring_fill_max", "ratio"),
        "Highest of the levels 0.5, 0.8, 0.95 that a packet ring of the worker has ever passed.",
        *(WORKER, _of_workers(lambda worker: worker.ring_fill_max_percent / 100)),
    ),
    Family(
        *("gauge", "mcr_worker_ring_fill", "ratio", "How full each packet ring is, within the last 0.1 s."),
        *((*WORKER, "interface"), _ring_fills),
    ),
    Family(
        *("histogram", "mcr_worker_relay_latency", "seconds"),
        "From the kernel's receive time of a datagram until it was sent; the sum is within 1/32.",
        *(WORKER, _latencies),
    ),
)
OF_RULES = (
    Family(
        *("gauge", "mcr_rule_active", "", "Whether the rule relays; 0 while it waits for an interface.", RULE),
        _of_rules(lambda rule: rule.state == "active"),
    ),
    Family(
        *("counter", "mcr_rule", "packets", "Datagrams that the rule matched.", RULE),
        _of_rules(lambda rule: rule.packets_matched),
    ),
    Family(
        *("counter", "mcr_rule", "bytes", "Payload of matched datagrams.", RULE),
        _of_rules(lambda rule: rule.bytes_matched),
    ),
    Family(
        *("counter", "mcr_rule_drops", "", "Matched datagrams that were given to no output, by cause."),
        *((*RULE, "cause"), _rule_drops),
    ),
    Family(
        *("gauge", "mcr_rule_last_packet_timestamp", "seconds"),
        "When the rule's last datagram came, in Unix time; without a sample before the first.",
        *(RULE, _of_rules(lambda rule: rule.last_packet_unix_s)),
    ),
)
OF_STREAMS = (
    Family(
        *("gauge", "mcr_rule_streams", "", "Sources that sent to the rule within the last minute.", RULE),
        _of_rules(_source_count),
    ),
    Family(
        *("counter", "mcr_rule_rtp_lost", "packets", "RTP datagrams that did not reach the relay.", RULE),
        _of_rtp("lost"),
    ),
    Family(
        *("counter", "mcr_rule_rtp_reordered", "packets", "RTP datagrams that came behind a later one.", RULE),
        _of_rtp("reordered"),
    ),
    Family(
        *("counter", "mcr_rule_rtp_duplicate", "packets", "RTP datagrams that came again.", RULE),
        _of_rtp("duplicates"),
    ),
    Family(
        *("gauge", "mcr_rule_rtp_jitter", "seconds", "Interarrival jitter of the rule's worst source.", RULE),
        _of_rules(_jitter_s),
    ),
    Family(
        *("counter", "mcr_rule_ts_continuity_errors", "", "Continuity counters of a PID that were not the next.", RULE),
        _of_mpeg_ts("continuity_errors"),
    ),
    Family(
        *("counter", "mcr_rule_ts_sync_losses", "", "Times that a transport stream lost its sync bytes.", RULE),
        _of_mpeg_ts("sync_losses"),
    ),
)
LEG = ("rule", "leg")
OF_PROTECTION = (
    Family(
        *("gauge", "mcr_rule_leg_delivers", "", "Whether datagrams come by this leg of a protected rule.", LEG),
        _of_legs(lambda leg: leg.delivers),
    ),
    Family(
        *("counter", "mcr_rule_leg", "packets", "Datagrams that came by this leg.", LEG),
        _of_legs(lambda leg: leg.packets),
    ),
    Family(
        *("counter", "mcr_rule_leg_first", "packets", "Of these, datagrams that were let through.", LEG),
        _of_legs(lambda leg: leg.firsts),
    ),
    Family(
        *("gauge", "mcr_rule_leg_missing", "packets", "Sequence numbers that this leg has not brought.", LEG),
        _of_legs(lambda leg: leg.missing),
    ),
    Family(
        *("gauge", "mcr_rule_on_secondary", "", "Whether a fail-over rule relays its secondary leg.", RULE),
        _of_protection(lambda p: None if p.active is None else p.active == LEG_NAMES[1]),
    ),
    Family(
        *("counter", "mcr_rule_withheld", "packets", "Second copies, and what came by the leg that stands by.", RULE),
        _of_protection(lambda p: p.withheld),
    ),
)
OF_OUTPUTS = (
    Family(
        *("counter", "mcr_output", "packets", "Datagrams of the rule that left by this output.", OUTPUT),
        lambda stats: [(labels, output.packets) for labels, output in _outputs(stats)],
    ),
    Family(
        *("counter", "mcr_output", "bytes", "Payload of datagrams that left.", OUTPUT),
        lambda stats: [(labels, output.bytes) for labels, output in _outputs(stats)],
    ),
    Family(
        *("counter", "mcr_output_drops", "", "Datagrams of the rule that did not leave, by cause."),
        *((*OUTPUT, "cause"), _output_drops),
    ),
)
FAMILIES = (*OF_THE_RELAY, *OF_WORKERS, *OF_RULES, *OF_STREAMS, *OF_PROTECTION, *OF_OUTPUTS)


def limited(stats: Stats, rules_max: int = RULES_MAX, outputs_max: int = OUTPUTS_MAX) -> tuple[Stats, int, int]:
    """The statistics of the first rules and of their first outputs, and how many of each were left out.

    The order is the relay's own: a rule that has series keeps them as long as none before it is removed.
    """
    kept: list[RuleStats] = []
    room = outputs_max
    for rule in stats.rules[:rules_max]:
        kept.append(msgspec.structs.replace(rule, outputs=rule.outputs[:room]))
        room -= len(kept[-1].outputs)
    outputs = sum(len(rule.outputs) for rule in stats.rules)
    return msgspec.structs.replace(stats, rules=kept), len(stats.rules) - len(kept), outputs - (outputs_max - room)
