"""A rule's limit on real traffic: it holds over all workers, beside it nothing is lost, and it is told once.

gen ──left── relay ──right── sink        10.1.0.0/24, 10.2.0.0/24
"""

import time
from pathlib import Path
from typing import Any

import pytest

from relay.dataplane.guard import BURST_NS
from relay.dataplane.layout import UDP_SEGMENTS_MAX
from tests.system.conftest import StartRelay
from tests.system.harness import Relay, assert_perfect, receiver, sender, wait_until
from tools.netns import Line

LIMITED, FREE, BITS = "239.2.2.2:6001:right", "239.2.2.3:6001:right", "239.2.2.4:6001:right"
RATE_PPS, MAX_PPS = 5000, 1000
SIZE_BYTES, MAX_BPS = 1000, 4_000_000
FLOWS = 32  # both workers get some: --fanout hash
WORKERS = 2
DROPPED_MIN = 4000
MORE_THAN_COMES = "100000000"


@pytest.fixture
def relay(line: Line, start_relay: StartRelay) -> Relay:
    relay = start_relay(line.hosts[1], ("left",), WORKERS)
    relay.add("limited", "239.1.1.1:5001", LIMITED, options=("--max-pps", str(MAX_PPS)))
    relay.add("free", "239.1.1.1:5001", FREE)
    relay.add("bits", "239.1.1.1:5001", BITS, options=("--max-bps", str(MAX_BPS)))
    return relay


def by_rule(stats: Any) -> dict[str, Any]:
    return {rule["rule_id"]: rule for rule in stats["rules"]}


def dropped(relay: Relay, rule_id: str) -> int:
    """What a rule's limit has cost."""
    return int(by_rule(relay.stats())[rule_id]["drops"]["rate_limit"])


def allowed(limit: int, span_s: float, batch: int) -> float:
    """The most that may pass in a span, whatever came. One batch a worker: they may close theirs at the same moment."""
    return limit * (span_s + BURST_NS / 1e9) + WORKERS * batch


def test_a_limit_holds_over_all_workers_and_is_told_once(line: Line, tmp_path: Path, relay: Relay) -> None:
    """Three rules of one input, of which two have limits: each gets what it may, the free one everything."""
    gen, _, sink = line.hosts
    to = ("--interface", "right", "--rate", str(RATE_PPS), "--flows", str(FLOWS), "--size", str(SIZE_BYTES))
    free = ("--interface", "left", "--group", "239.2.2.3", "--flows", str(FLOWS))
    begin_s = time.monotonic()
    with receiver(sink, tmp_path, *free) as received, sender(gen, tmp_path, *to) as sent:
        wait_until(lambda: min(dropped(relay, "limited"), dropped(relay, "bits")) >= DROPPED_MIN, "much is dropped")
        relay.wait_for_log("Rule limited is over its limit of 1000 packets/s")
        relay.wait_for_log("Rule bits is over its limit of 4000000 bit/s")
        first = by_rule(relay.stats())["limited"]
        first_s = time.monotonic() - begin_s
        # Another limit, while it flows: at once, and of no concern to the others.
        relay.add("limited", "239.1.1.1:5001", LIMITED, options=("--replace", "--max-pps", MORE_THAN_COMES))
        before = dropped(relay, "limited")
        passed = by_rule(relay.stats())["limited"]["packets_matched"]
        wait_until(lambda: by_rule(relay.stats())["limited"]["packets_matched"] > passed + RATE_PPS, "traffic goes on")
        count = sent.interrupt()["datagrams"]
        assert_perfect(received.drain(count), count)
    span_s = time.monotonic() - begin_s
    stats = relay.assert_accounted()
    rules = by_rule(stats)
    assert first["packets_relayed"] <= allowed(MAX_PPS, first_s, UDP_SEGMENTS_MAX)
    assert 8 * rules["bits"]["bytes_relayed"] <= allowed(MAX_BPS, span_s, 8 * 65_507)
    assert rules["bits"]["packets_relayed"]
    assert first["packets_relayed"]
    assert rules["free"]["drops"] == {"rate_limit": 0}
    assert rules["free"]["packets_relayed"] == rules["free"]["packets_matched"] == count
    assert before == rules["limited"]["drops"]["rate_limit"]
    assert [worker["packets_matched"] > 0 for worker in stats["workers"]] == [True] * WORKERS
    assert [worker["drops"]["rate_limit"] > 0 for worker in stats["workers"]] == [True] * WORKERS
    of_rules = sum(rule["drops"]["rate_limit"] for rule in stats["rules"])
    assert of_rules == stats["drops"]["rate_limit"] == sum(w["drops"]["rate_limit"] for w in stats["workers"])
    assert not {cause: n for cause, n in stats["drops"].items() if n and cause not in ("rate_limit", "no_match")}
    for name in ("limited", "bits"):
        assert relay.text().count(f"Rule {name} is over its limit") == 1
    assert "Dropped" not in relay.text()
    assert_told_by_commands(relay, of_rules)


def assert_told_by_commands(relay: Relay, count: int) -> None:
    """What tells of drops tells of these."""
    told = relay.control("get-stats").stdout
    assert f"rate_limit {count}" in told
    line = next(line for line in told.splitlines() if line.startswith("bits"))
    assert line.split()[3] == str(dropped(relay, "bits"))
    explained = relay.control("explain", "10.1.0.1", "239.1.1.1:5001", "--interface", "left").stdout
    assert "rule bits lets 4000000 bit/s pass, more is dropped as rate_limit" in explained
    metrics = relay.control("metrics", "--once").stdout
    assert f'mcr_rule_drops_total{{cause="rate_limit",rule="bits"}} {float(dropped(relay, "bits"))}' in metrics
    rows = {row.split()[0]: row for row in relay.control("top", "--once").stdout.splitlines() if row.strip()}
    assert str(dropped(relay, "bits")) in rows["bits"].split()
