"""Outputs that fail: dropped and counted under their cause, and no other output notices.

gen ──left── relay ══right, spare══ sink        10.1.0.0/24, 10.2.0.0/24, 10.3.0.0/24
"""

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.system.conftest import StartRelay
from tests.system.harness import Relay, assert_perfect, receiving, send, wait_until
from tools.netns import Host, Line, connect

PPS = 50_000
SECONDS = int(os.environ.get("MCR_FAULT_SECONDS", "1"))  # of traffic
COUNT = PPS * SECONDS
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


def deep_queue(host: Host) -> None:
    """It never overflows, so the socket's send buffer does."""
    tc(host, "qdisc", "add", "dev", "right", "root", "tbf", "rate", "1mbit", "burst", "70kb", "limit", "1000mb")


def short_queue(host: Host) -> None:
    """Too slow for the traffic, but soon empty; no super-frame is larger than `burst`, so each leaves or is dropped."""
    root = ("qdisc", "add", "dev", "right", "root", "handle", "1:", "tbf")
    tc(host, *root, "rate", "50mbit", "burst", "70kb", "limit", "140kb")
    tc(host, "qdisc", "add", "dev", "right", "parent", "1:1", "pfifo", "limit", "1")


def firewall(host: Host) -> None:
    rule = "ip daddr { 239.2.2.1, 10.2.0.99 } drop"
    nft(host, f"table ip t {{ chain o {{ type filter hook output priority 0; {rule}; }}\n}}")


PRESERVE = ("--preserve-source",)
FAULTS: dict[str, tuple[Callable[[Host], None], str, tuple[str, ...], str]] = {
    "queue full": (slow_egress, SICK, (), "egress_full"),
    "queue full, source preserved": (slow_egress, SICK, PRESERVE, "egress_full"),
    "queue of one": (short_queue, SICK, (), "egress_full"),
    "send buffer full": (deep_queue, SICK, (), "egress_full"),
    "send buffer full, unicast": (deep_queue, "10.2.0.2:6001:right", (), "egress_full"),
    "firewall": (firewall, SICK, (), "send_error_errno_1"),
    "firewall, unicast": (firewall, UNICAST, (), "send_error_errno_1"),
}


def relay_both(line: Line, relay: Relay, folder: Path, sick: str, options: Sequence[str] = ()) -> dict[str, Any]:
    """Send to a rule with a sick output and a sound one, and to another rule; the sound ones get everything."""
    gen, _, sink = line.hosts
    relay.add("sick", IN, sick, BESIDE, options=options)
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
    break_it, output, options, cause = FAULTS[fault]
    relay = start_relay(host, ("left",), 1, "--ring-mib", "64")
    break_it(host)
    stats = relay_both(line, relay, tmp_path, output, options)
    assert 0 < stats["drops"][cause] <= COUNT // 2
    (sick,) = [o for rule in stats["rules"] for o in rule["outputs"] if o["output"] == output]
    assert sum(sick["drops"].values()) == stats["drops"][cause]
    assert cause == "egress_full" or stats["drops"]["egress_full"] == 0
    relay.stop()


def test_what_is_counted_as_sent_has_left(line: Line, host: Host, start_relay: StartRelay, tmp_path: Path) -> None:
    """Of a queue that is too slow: the receiver has exactly what the output counts."""
    gen, _, sink = line.hosts
    relay = start_relay(host, ("left",), 1, "--ring-mib", "64")
    short_queue(host)
    relay.add("r", IN, SICK)
    with receiving(sink, tmp_path, "--interface", "left", "--group", "239.2.2.1", "--idle-timeout", "2") as summary:
        send(gen, "--interface", "right", "--rate", str(PPS), "--count", str(COUNT))
        received = summary()
    (output,) = relay.assert_accounted()["rules"][0]["outputs"]
    assert 0 < output["packets"] < COUNT
    assert received["datagrams"] == output["packets"]
    assert (received["reordered"], received["duplicated"], received["corrupt"]) == (0, 0, 0)
    relay.stop()


def test_a_full_queue_that_unicast_is_not_told_of_is_told_in_the_log(
    line: Line, host: Host, start_relay: StartRelay, tmp_path: Path
) -> None:
    relay = start_relay(host, ("left",), 1, "--ring-mib", "64")
    slow_egress(host)
    relay_both(line, relay, tmp_path, "10.2.0.2:6001:right")
    relay.wait_for_log("[Warning] [Supervisor] Interface right dropped ")
    assert "Interface spare dropped" not in relay.stop()


def test_an_output_recovers_when_its_fault_is_over(
    line: Line, host: Host, start_relay: StartRelay, tmp_path: Path
) -> None:
    """Under traffic: what is missing is what was counted, and the rest is in order."""
    gen, _, sink = line.hosts
    relay = start_relay(host, ("left",), 1, "--ring-mib", "64")
    relay.add("r", IN, SICK, BESIDE)
    left = ("--interface", "left", "--group", "239.2.2.1", "--idle-timeout", "2")
    spare = ("--interface", "spare", "--group", "239.2.2.2", "--idle-timeout", "2")
    with receiving(sink, tmp_path, *left) as sick, receiving(sink, tmp_path, *spare) as beside:
        to = ("--interface", "right", "--rate", str(PPS), "--count", str(6 * COUNT))
        sending = threading.Thread(target=send, args=(gen, *to))
        sending.start()
        wait_until(lambda: relay.stats()["packets_relayed"] > 1000, "traffic flows")
        firewall(host)
        wait_until(lambda: relay.stats()["drops"].get("send_error_errno_1", 0) > 1000, "the fault is felt")
        nft(host, "delete table ip t")
        sending.join()
        received = sick()
        assert_perfect(beside(), 6 * COUNT)
    dropped = relay.assert_accounted()["drops"]["send_error_errno_1"]
    assert received["lost"] == dropped
    assert received["datagrams"] == 6 * COUNT - dropped
    assert received["reordered"] == received["duplicated"] == 0
    lines = [text for text in relay.stop().splitlines() if "datagrams: send_error" in text]
    assert 0 < len(lines) <= 6 * SECONDS + 2  # one a second at most


@pytest.mark.parametrize("route", ["there", "unreachable"])
def test_a_receiver_that_answers_no_arp_harms_no_other(
    line: Line, host: Host, start_relay: StartRelay, tmp_path: Path, route: str
) -> None:
    """The kernel drops what waits for an answer, and tells nobody; without a route it looks on the output's link.

    So the log tells it, once, and when there is an answer.
    """
    relay = start_relay(host, ("left",), 1, "--ring-mib", "64")
    if route == "unreachable":
        host.ip("route", "add", "unreachable", "10.2.0.99/32")
    relay_both(line, relay, tmp_path, UNICAST)
    neighbours = str(host.run(["ip", "neigh"], capture_output=True).stdout)
    assert "10.2.0.99 dev right" in neighbours
    gen, _, sink = line.hosts
    to = ("--interface", "right", "--rate", "1000", "--count", str(4000 * SECONDS))
    send(gen, *to)  # more looks while nobody answers
    sink.ip("addr", "add", "10.2.0.99/24", "dev", "left")
    send(gen, *to)
    relay.wait_for_log("10.2.0.99 on right is looked for no more, or answers")
    assert relay.stop().count("No ARP answer from 10.2.0.99 on right") == 1


def wait_for_more(relay: Relay) -> None:
    before = relay.stats()["packets_relayed"]
    wait_until(lambda: relay.stats()["packets_relayed"] > before + 1000, "traffic flows on")


def test_a_lowered_and_raised_mtu_makes_fragments_and_loses_nothing(
    line: Line, host: Host, start_relay: StartRelay, tmp_path: Path
) -> None:
    gen, _, sink = line.hosts
    relay = start_relay(host, ("left",), 1, "--ring-mib", "64")
    relay.add("r", IN, SICK)
    with receiving(sink, tmp_path, "--interface", "left", "--group", "239.2.2.1", "--idle-timeout", "2") as summary:
        to = ("--interface", "right", "--rate", str(PPS), "--count", str(6 * COUNT))
        sending = threading.Thread(target=send, args=(gen, *to))
        sending.start()
        wait_until(lambda: relay.stats()["packets_relayed"] > 1000, "traffic flows")
        for mtu_bytes in (MTU, 1500):
            host.ip("link", "set", "right", "mtu", str(mtu_bytes))
            relay.wait_for_log(f"Interface right has an MTU of {mtu_bytes} bytes")
            wait_for_more(relay)
        sending.join()
        assert_perfect(summary(), 6 * COUNT)
    stats = relay.assert_accounted()
    assert stats["drops"]["egress_full"] == stats["drops"]["send_error"] == 0
    assert relay.stop().count("Segmentation refused") <= 1  # what was on its way when the MTU changed
