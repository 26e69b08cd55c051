"""What the metrics say, of statistics that are written down here."""

import re
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from relay.health import MpegTsTotals, RtpHealth, RtpTotals, StreamHealth
from relay.messages import LATENCY_BOUNDS_NS, Latency, OutputStats, RuleStats, Stats, WorkerStats
from relay.metrics.families import FAMILIES, Family, limited
from relay.protection import LegHealth, ProtectionHealth


def output(name: str, packets: int = 1) -> OutputStats:
    return OutputStats(name, packets, 10 * packets, {"ttl": 0, "egress_full": 2, "send_error": 1}, slot=0)


def rule(
    rule_id: str, *outputs: OutputStats, state: str = "active", last_s: float | None = 1000.5, **of_streams: Any
) -> RuleStats:
    return RuleStats(rule_id, state, 3, 30, 3, 30, 0.0, 0.0, list(outputs), 0, last_s, **of_streams)


def stream(source: str, silent_ms: float = 1.0, jitter_us: float | None = None, core: int = 2) -> StreamHealth:
    """A stream as a worker tells it; with a jitter it is RTP."""
    health = None if jitter_us is None else RtpHealth(7, 33, 0, 0, 0, jitter_us, jitter_us, 0, 0)
    return StreamHealth(
        core=core,
        ring=0,
        interface="lo",
        source=source,
        destination="239.1.1.1:5001",
        payload="udp" if health is None else "rtp",
        packets=1,
        bytes=1,
        first_packet_ns=1,
        last_packet_ns=1,
        silent_ms=silent_ms,
        gaps=0,
        gap_last_ms=0.0,
        gap_max_ms=0.0,
        malformed=0,
        rtp=health,
    )


def leg(delivers: bool = True, missing: int | None = None) -> LegHealth:
    return LegHealth("239.1.1.1:5001", delivers, 1.0, packets=20, firsts=8, missing=missing)


AT_MOST = [10 * i for i in range(len(LATENCY_BOUNDS_NS))]

LATENCY = Latency(1000, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, sum_us=2_500_000.0, at_most=AT_MOST)
WORKER = WorkerStats(
    *(2, 77, "running", 1.0, 9, 90, 8, 7, 70, 0.0, 0.0, 80),
    {"ring_full": 5, "send_error": 1, "send_error_errno_1": 1},
    stats_segment="mcr_dp_c2_stats",
    restarts=4,
    latency=LATENCY,
    ring_fill_percent={"eth0": 0, "eth1": 7},
)
OF_STREAMS: dict[str, Any] = {
    "streams": [stream("10.0.0.1:1", jitter_us=40.0), stream("10.0.0.2:1", jitter_us=900.0)],
    "rtp": RtpTotals(15, 5, 4),
    "mpeg_ts": MpegTsTotals(23, 1),
}
STATS = Stats(
    *(1, 12.5, 9, 90, 8, 7, 70, 0.0, 0.0, {}),
    [
        rule("tv", output("239.2.2.2:6001:lo"), drops={"rate_limit": 6}, **OF_STREAMS),
        rule("radio", state="waiting: no interface", last_s=None),
        rule("both", protection=ProtectionHealth("seamless", None, 0, 14, 0, [leg(missing=3), leg(delivers=False)])),
        rule("either", protection=ProtectionHealth("failover", "secondary", 1, 5, 0, [leg(), leg()])),
    ],
    [WORKER],
)


class Fixed(Collector):
    def __init__(self, families: tuple[Family, ...], stats: Stats) -> None:
        self._metrics = [family.fill(stats) for family in families]

    def collect(self) -> list[Metric]:
        return self._metrics


def registry(stats: Stats = STATS, families: tuple[Family, ...] = FAMILIES) -> CollectorRegistry:
    made = CollectorRegistry()
    made.register(Fixed(families, stats))
    return made


def as_openmetrics(made: CollectorRegistry) -> list[Metric]:
    """Exposed as OpenMetrics and read again by a strict parser."""
    text = openmetrics(made).decode()  # type: ignore[no-untyped-call]
    return list(text_string_to_metric_families(text))  # type: ignore[no-untyped-call]


def value(name: str, stats: Stats = STATS, **labels: str) -> float | None:
    return registry(stats).get_sample_value(name, labels)


def test_numbers_are_those_of_the_statistics() -> None:
    assert value("mcr_uptime_seconds") == 12.5
    assert value("mcr_worker_received_packets_total", core="2") == 9
    assert value("mcr_worker_relayed_bytes_total", core="2") == 70
    assert value("mcr_worker_restarts_total", core="2") == 4
    assert value("mcr_worker_ring_fill_max_ratio", core="2") == 0.8
    assert value("mcr_worker_ring_fill_ratio", core="2", interface="eth1") == 0.07
    assert value("mcr_worker_drops_total", core="2", cause="ring_full") == 5
    assert value("mcr_rule_packets_total", rule="tv") == 3
    assert value("mcr_rule_last_packet_timestamp_seconds", rule="tv") == 1000.5
    assert value("mcr_rule_drops_total", rule="tv", cause="rate_limit") == 6
    assert value("mcr_output_bytes_total", rule="tv", output="239.2.2.2:6001:lo") == 10
    assert value("mcr_output_drops_total", rule="tv", output="239.2.2.2:6001:lo", cause="egress_full") == 2


def test_errors_have_their_names_and_are_counted_beside_the_causes() -> None:
    assert value("mcr_worker_send_errors_total", core="2", errno="EPERM") == 1
    assert value("mcr_worker_drops_total", core="2", cause="send_error") == 1
    assert value("mcr_worker_drops_total", core="2", cause="send_error_errno_1") is None
    unknown = msgspec.structs.replace(WORKER, drops={"send_error_errno_132": 1, "send_error_errno_0": 2})
    stats = msgspec.structs.replace(STATS, workers=[unknown])
    assert value("mcr_worker_send_errors_total", stats, core="2", errno="0") == 2


def test_a_rule_that_waits_says_so_and_has_no_time_before_its_first_datagram() -> None:
    assert (value("mcr_rule_active", rule="tv"), value("mcr_rule_active", rule="radio")) == (1, 0)
    assert (value("mcr_rules", state="active"), value("mcr_rules", state="waiting")) == (3, 1)
    assert value("mcr_rule_last_packet_timestamp_seconds", rule="radio") is None


def test_what_is_over_a_limit_is_left_out_and_counted() -> None:
    rules = [rule(f"r{number}", output("a"), output("b"), output("c")) for number in range(5)]
    stats = msgspec.structs.replace(STATS, rules=rules)
    kept, rules_omitted, outputs_omitted = limited(stats, rules_max=3, outputs_max=5)
    assert [(r.rule_id, len(r.outputs)) for r in kept.rules] == [("r0", 3), ("r1", 2), ("r2", 0)]
    assert (rules_omitted, outputs_omitted) == (2, 10)
    assert limited(stats) == (stats, 0, 0)


def test_every_metric_has_a_meaning_and_only_these_labels() -> None:
    """No address of a sender is a label: anybody can send, and each would be a series."""
    for family in FAMILIES:
        assert family.help.endswith(".")
        assert set(family.labels) <= {"core", "cause", "errno", "interface", "rule", "leg", "output", "state"}
    names = [name for family in FAMILIES for name in family.exposed()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("families", [FAMILIES, FAMILIES[:1]])
def test_names_are_exposed_as_the_table_says(families: tuple[Family, ...]) -> None:
    told = {sample.name for metric in as_openmetrics(registry(families=families)) for sample in metric.samples}
    assert told == {name for family in families for name in family.exposed()}


def test_faults_of_streams_are_those_of_the_rule() -> None:
    assert value("mcr_rule_rtp_lost_packets_total", rule="tv") == 15
    assert value("mcr_rule_rtp_reordered_packets_total", rule="tv") == 5
    assert value("mcr_rule_rtp_duplicate_packets_total", rule="tv") == 4
    assert value("mcr_rule_ts_continuity_errors_total", rule="tv") == 23
    assert value("mcr_rule_ts_sync_losses_total", rule="tv") == 1
    assert value("mcr_rule_rtp_jitter_seconds", rule="tv") == 0.0009
    for name in ("rtp_lost_packets_total", "ts_continuity_errors_total", "rtp_jitter_seconds"):
        assert value(f"mcr_rule_{name}", rule="radio") is None, "nothing was looked into"
    assert (value("mcr_rule_streams", rule="tv"), value("mcr_rule_streams", rule="radio")) == (2, 0)


def test_legs_of_protected_rules_are_told_and_of_others_there_are_none() -> None:
    legs = [value("mcr_rule_leg_delivers", rule="both", leg=name) for name in ("primary", "secondary")]
    assert legs == [1, 0]
    assert value("mcr_rule_leg_packets_total", rule="either", leg="secondary") == 20
    assert value("mcr_rule_leg_first_packets_total", rule="both", leg="primary") == 8
    assert value("mcr_rule_leg_missing_packets", rule="both", leg="primary") == 3
    assert value("mcr_rule_leg_missing_packets", rule="either", leg="primary") is None
    assert [value("mcr_rule_on_secondary", rule=name) for name in ("both", "either", "tv")] == [None, 1, None]
    assert [value("mcr_rule_withheld_packets_total", rule=name) for name in ("both", "either", "tv")] == [14, 5, None]


def test_sources_that_have_ended_are_none_and_one_of_two_workers_is_one() -> None:
    seen = [stream("10.0.0.1:1"), stream("10.0.0.1:1", core=3), stream("10.0.0.2:1", 60_000, 10_000.0)]
    stats = msgspec.structs.replace(STATS, rules=[rule("tv", streams=seen)])
    assert value("mcr_rule_streams", stats, rule="tv") == 1
    assert value("mcr_rule_rtp_jitter_seconds", stats, rule="tv") is None


def test_latency_is_a_histogram_of_few_buckets() -> None:
    text = generate_latest(registry()).decode()
    buckets = re.findall(r'mcr_worker_relay_latency_seconds_bucket{core="2",le="(.*)"} (.*)', text)
    assert len(buckets) <= 20
    assert [float(bound) for bound, _ in buckets[:-1]] == [bound_ns / 1e9 for bound_ns in LATENCY_BOUNDS_NS]
    assert [float(count) for _, count in buckets] == [*AT_MOST, 1000]
    assert value("mcr_worker_relay_latency_seconds_count", core="2") == 1000
    assert value("mcr_worker_relay_latency_seconds_sum", core="2") == 2.5


@pytest.mark.parametrize("latency", [None, msgspec.structs.replace(LATENCY, at_most=[])])
def test_a_worker_that_relayed_nothing_and_one_of_an_older_relay_have_none(latency: Latency | None) -> None:
    stats = msgspec.structs.replace(STATS, workers=[msgspec.structs.replace(WORKER, latency=latency)])
    assert value("mcr_worker_relay_latency_seconds_count", stats, core="2") is None


def test_any_name_of_an_interface_is_a_label() -> None:
    name = '239.2.2.2:1:e"\\é'
    stats = msgspec.structs.replace(STATS, rules=[rule("tv", output(name))])
    metrics = as_openmetrics(registry(stats))
    assert name in {sample.labels.get("output") for metric in metrics for sample in metric.samples}
