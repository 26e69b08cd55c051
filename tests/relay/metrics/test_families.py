"""What the metrics say, of statistics that are written down here."""

import msgspec
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from relay.messages import OutputStats, RuleStats, Stats, WorkerStats
from relay.metrics.families import FAMILIES, Family, limited


def output(name: str, packets: int = 1) -> OutputStats:
    return OutputStats(name, packets, 10 * packets, {"ttl": 0, "egress_full": 2, "send_error": 1}, slot=0)


def rule(rule_id: str, *outputs: OutputStats, state: str = "active", last_s: float | None = 1000.5) -> RuleStats:
    return RuleStats(rule_id, state, 3, 30, 3, 30, 0.0, 0.0, list(outputs), 0, last_s)


WORKER = WorkerStats(
    *(2, 77, "running", 1.0, 9, 90, 8, 7, 70, 0.0, 0.0, 80),
    {"ring_full": 5, "send_error": 1, "send_error_errno_1": 1},
    stats_segment="mcr_dp_c2_stats",
    restarts=4,
)
STATS = Stats(
    *(1, 12.5, 9, 90, 8, 7, 70, 0.0, 0.0, {}),
    [rule("tv", output("239.2.2.2:6001:lo")), rule("radio", state="waiting: no interface", last_s=None)],
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
    assert value("mcr_worker_drops_total", core="2", cause="ring_full") == 5
    assert value("mcr_rule_packets_total", rule="tv") == 3
    assert value("mcr_rule_last_packet_timestamp_seconds", rule="tv") == 1000.5
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
    assert (value("mcr_rules", state="active"), value("mcr_rules", state="waiting")) == (1, 1)
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
        assert set(family.labels) <= {"core", "cause", "errno", "rule", "output", "state"}
    names = [name for family in FAMILIES for name in family.exposed()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("families", [FAMILIES, FAMILIES[:1]])
def test_names_are_exposed_as_the_table_says(families: tuple[Family, ...]) -> None:
    told = {sample.name for metric in as_openmetrics(registry(families=families)) for sample in metric.samples}
    assert told == {name for family in families for name in family.exposed()}


def test_a_rule_can_have_a_histogram() -> None:
    """As a row of the table, without another line of code."""
    latency = Family(
        *("histogram", "mcr_rule_latency", "seconds", "A test's.", ("rule",)),
        lambda stats: [((rule.rule_id,), ([("0.001", 2.0), ("+Inf", 3.0)], 0.25)) for rule in stats.rules],
    )
    text = generate_latest(registry(families=(latency,))).decode()
    assert 'mcr_rule_latency_seconds_bucket{le="0.001",rule="tv"} 2.0' in text
    assert 'mcr_rule_latency_seconds_count{rule="tv"} 3.0' in text
    assert 'mcr_rule_latency_seconds_sum{rule="tv"} 0.25' in text
    assert latency.exposed()[0] == "mcr_rule_latency_seconds_bucket"


def test_any_name_of_an_interface_is_a_label() -> None:
    name = '239.2.2.2:1:e"\\é'
    stats = msgspec.structs.replace(STATS, rules=[rule("tv", output(name))])
    metrics = as_openmetrics(registry(stats))
    assert name in {sample.labels.get("output") for metric in metrics for sample in metric.samples}
