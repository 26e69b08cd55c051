"""Outputs that fail: dropped and counted under their cause, and no other output notices.

gen ──left── relay ══right, spare══ sink        10.1.0.0/24, 10.2.0.0/24, 10.3.0.0/24
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.system.conftest import StartRelay
from tests.system.harness import Relay, assert_perfect, receiving, send, wait_until
from tools.netns import Host, Line, connect

PPS = 50_000
COUNT = 100_000
IN, OTHER_IN = "239.1.1.1:5001", "239.1.1.2:5001"
SICK, BESIDE, OTHER = "239.2.2.1:6001:right", "239.2.2.2:6001:spare", "239.2.2.3:6001:spare"
UNICAST = "10.2.0.99:6001:right"
MTU = 1000


@pytest.fixture
def host(line: Line) -> Host:
    """The relay's host, with a second cable to the sink."""
    _, relay, sink = line.hosts
    connect(relay, "spare", "10.3.0.1/24", sink, "spare", "10.3.0.2/24")
    return relay


def tc(host: Host, *arguments: str) -> None:
    result = host.run(["tc", *arguments], capture_output=True)
    assert result.returncode == 0, result.stderr


def nft(host: Host, rules: str) -> None:
    result = host.run(["nft", "-f", "-"], input=rules, capture_output=True)
    assert result.returncode == 0, result.stderr


def slow_egress(host: Host) -> None:
    tc(host, "qdisc", "add", "dev", "right", "root", "tbf", "rate", "1mbit", "burst", "70kb", "limit", "140kb")


def firewall(host: Host) -> None:
    nft(host, "table ip t { chain o { type filter hook output priority 0; ip daddr 239.2.2.1 drop; }\n}")


def unreachable(host: Host) -> None:
    host.ip("route", "add", "unreachable", "10.2.0.99/32")


FAULTS: dict[str, tuple[Callable[[Host], None], str, str]] = {
    "queue full": (slow_egress, SICK, "egress_full"),
    "firewall": (firewall, SICK, "send_error_errno_1"),
    "no route": (unreachable, UNICAST, "send_error_errno_113"),
}


def relay_both(line: Line, relay: Relay, folder: Path, sick: str) -> dict[str, Any]:
    """Send to a rule with a sick output and a sound one, and to another rule; the sound ones get everything."""
    gen, _, sink = line.hosts
    relay.add("sick", IN, sick, BESIDE)
    relay.add("other", OTHER_IN, OTHER)
    beside = ("--interface", "spare", "--group", "239.2.2.2", "--idle-timeout", "2")
    other = ("--interface", "spare", "--group", "239.2.2.3", "--idle-timeout", "2")
    with receiving(sink, folder, *beside) as first, receiving(sink, folder, *other) as second:
        to = ("--interface", "right", "--rate", str(PPS // 2), "--count", str(COUNT // 2))
        groups = [("--group", "239.1.1.1"), ("--group", "239.1.1.2")]
        sending = [threading.Thread(target=send, args=(gen, *to, *group)) for group in groups]
        for thread in sending:
            thread.start()
        for thread in sending:
            thread.join()
        assert_perfect(first(), COUNT // 2)
        assert_perfect(second(), COUNT // 2)
    stats: dict[str, Any] = relay.assert_accounted()
    return stats


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failing_output_is_counted_under_its_cause_and_harms_no_other(
    line: Line, host: Host, start_relay: StartRelay, tmp_path: Path, fault: str
) -> None:
    break_it, output, cause = FAULTS[fault]
    relay = start_relay(host, ("left",), 1, "--ring-mib", "64")
    break_it(host)
    stats = relay_both(line, relay, tmp_path, output)
    assert 0 < stats["drops"][cause] <= COUNT // 2
    (sick,) = [o for rule in stats["rules"] for o in rule["outputs"] if o["output"] == output]
    assert sum(sick["drops"].values()) == stats["drops"][cause]
    relay.stop()


def test_a_receiver_that_answers_no_arp_harms_no_other(
    line: Line, host: Host, start_relay: StartRelay, tmp_path: Path
) -> None:
    relay = start_relay(host, ("left",), 1, "--ring-mib", "64")
    relay_both(line, relay, tmp_path, UNICAST)
    neighbours = str(host.run(["ip", "neigh"], capture_output=True).stdout)
    assert "10.2.0.99 dev right" in neighbours
    relay.stop()


def test_a_lowered_mtu_makes_fragments_and_loses_nothing(
    line: Line, host: Host, start_relay: StartRelay, tmp_path: Path
) -> None:
    gen, _, sink = line.hosts
    relay = start_relay(host, ("left",), 1, "--ring-mib", "64")
    relay.add("r", IN, SICK)
    with receiving(sink, tmp_path, "--interface", "left", "--group", "239.2.2.1", "--idle-timeout", "2") as summary:
        to = ("--interface", "right", "--rate", str(PPS), "--count", str(COUNT))
        sending = threading.Thread(target=send, args=(gen, *to))
        sending.start()
        wait_until(lambda: relay.stats()["packets_relayed"] > 1000, "traffic flows")
        host.ip("link", "set", "right", "mtu", str(MTU))
        sending.join()
        assert_perfect(summary(), COUNT)
    assert relay.assert_accounted()["drops"]["egress_full"] == 0
    relay.stop()
