"""Outputs that fail: dropped and counted under their cause, and no other output notices.

gen ──left── relay ══right, spare══ sink        10.1.0.0/24, 10.2.0.0/24, 10.3.0.0/24
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.system.conftest import StartRelay
from tests.system.harness import Relay, Tool, assert_perfect, receiver, sender, wait_until
from tools.netns import Host, Line, connect

PPS = 16_000  # two streams; with more small frames a busy machine overruns the backlog of veth (netdev_max_backlog)
SILENT_PPS = 100
FELT = 1000  # datagrams
IN, OTHER_IN, SILENT_IN = "239.1.1.1:5001", "239.1.1.2:5001", "239.1.1.3:5001"
SICK, BESIDE, OTHER = "239.2.2.1:6001:right", "239.2.2.2:6001:spare", "239.2.2.3:6001:spare"
PRESERVED, UNICAST = "239.2.2.4:6001:right", "10.2.0.2:6001:right"
SILENT, UNROUTED = "10.2.0.99:6001:right", "10.2.0.98:6001:right"
ENDLESS = 1_000_000  # frames
FAST = "1gbit"
MTU = 1000
DROPS = dict[str, dict[str, int]]  # output → cause → datagrams


def run(host: Host, *command: str, text: str = "") -> None:
    result = host.run(command, input=text, capture_output=True)
    assert result.returncode == 0, result.stderr


def set_queue(host: Host, rate: str, frames: int, verb: str = "change") -> None:
    """Let `right` send so fast, and hold so many frames. No super-frame is larger than `burst`: none is cut."""
    device = ("dev", "right")
    run(
        host, "tc", "qdisc", verb, *device, "root", "handle", "1:", "tbf", "rate", rate, "burst", "70kb", "limit", "1mb"
    )
    run(host, "tc", "qdisc", verb, *device, "parent", "1:1", "handle", "10:", "pfifo", "limit", str(frames))


def output_drops(relay: Relay) -> DROPS:
    rules = relay.stats()["rules"]
    return {output["output"]: output["drops"] for rule in rules for output in rule["outputs"]}


def output_packets(relay: Relay) -> dict[str, int]:
    rules = relay.stats()["rules"]
    return {output["output"]: output["packets"] for rule in rules for output in rule["outputs"]}


def wait_for_drops(relay: Relay, before: DROPS, cause: str, *outputs: str) -> None:
    def are_felt() -> bool:
        drops = output_drops(relay)
        return all(drops[output][cause] >= before[output][cause] + FELT for output in outputs)

    wait_until(are_felt, f"{cause} of {outputs}")


def wait_until_all_send(relay: Relay) -> None:
    before = output_packets(relay)

    def do_send() -> bool:
        packets = output_packets(relay)
        return all(packets[output] >= before[output] + FELT for output in before if output not in (SILENT, UNROUTED))

    wait_until(do_send, "every output sends again")


def assert_only(before: DROPS, after: DROPS, cause: str, *outputs: str) -> None:
    """Since `before`, these outputs dropped for this cause, and none for another."""
    grown = {(o, c) for o, drops in after.items() for c in drops if drops[c] > before[o][c]}
    assert grown == {(output, cause) for output in outputs}


def refuse_by_firewall(relay: Relay, host: Host) -> None:
    rule = "ip daddr { 239.2.2.1, 10.2.0.2 } drop"
    before = output_drops(relay)
    run(host, "nft", "-f", "-", text=f"table ip t {{ chain o {{ type filter hook output priority 0; {rule}; }}\n}}")
    wait_for_drops(relay, before, "send_error", SICK, UNICAST)
    run(host, "nft", "delete", "table", "ip", "t")
    wait_until_all_send(relay)
    assert_only(before, output_drops(relay), "send_error", SICK, UNICAST)
    drops = relay.stats()["drops"]
    assert drops["send_error"] == drops["send_error_errno_1"]  # EPERM


def fill_queue(relay: Relay, host: Host, rate: str, frames: int) -> None:
    """Unicast is not told, and goes on."""
    before = output_drops(relay)
    set_queue(host, rate, frames)
    wait_for_drops(relay, before, "egress_full", SICK, PRESERVED)
    set_queue(host, FAST, ENDLESS)
    wait_until_all_send(relay)
    assert_only(before, output_drops(relay), "egress_full", SICK, PRESERVED)


def fill_send_buffer(relay: Relay, host: Host) -> None:
    """The queue has room for more than the sockets have."""
    before = output_drops(relay)
    set_queue(host, "1mbit", ENDLESS)
    wait_for_drops(relay, before, "egress_full", SICK, PRESERVED, UNICAST)
    run(host, "tc", "qdisc", "delete", "dev", "right", "root")  # with all that it held
    wait_until_all_send(relay)
    assert_only(before, output_drops(relay), "egress_full", SICK, PRESERVED, UNICAST)


def change_mtu(relay: Relay, host: Host) -> None:
    """What is too large leaves in fragments."""
    before = output_drops(relay)
    for mtu_bytes in (MTU, 1500):
        host.ip("link", "set", "right", "mtu", str(mtu_bytes))
        relay.wait_for_log(f"Interface right has an MTU of {mtu_bytes} bytes")
        wait_until_all_send(relay)
    assert output_drops(relay) == before
    # What is on its way when the MTU changes is refused, once for each socket.
    assert relay.text().count("Segmentation refused") <= len(before)


def answer_arp(relay: Relay, sink: Host) -> None:
    """The kernel drops what waits for an answer, and tells nobody: the log names the receiver."""
    for address in ("10.2.0.98", "10.2.0.99"):
        relay.wait_for_log(f"No ARP answer from {address} on right")
        sink.ip("addr", "add", f"{address}/24", "dev", "left")
        relay.wait_for_log(f"{address} on right is looked for no more, or answers")


@contextmanager
def streams(line: Line, relay: Relay, folder: Path) -> Iterator[Tool]:
    """Traffic of the two rules during the block; the outputs that nothing fails get all of it. Gives the sender."""
    gen, _, sink = line.hosts
    before = relay.stats()
    spare = ("--interface", "spare", "--group", "239.2.2.2", "--flows", "2", "--flow-by", "group")
    two = ("--interface", "right", "--rate", str(PPS), "--no-gso", "--flows", "2", "--flow-by", "group")
    with receiver(sink, folder, *spare) as received, sender(gen, folder, *two) as sending:
        wait_until_all_send(relay)
        yield sending
        sent = sending.interrupt()["datagrams"]
        summary = received.drain()
    after = relay.assert_accounted()
    assert matched(after, "sick", "other") - matched(before, "sick", "other") == sent
    assert_perfect(summary, sent)


def matched(stats: Any, *rule_ids: str) -> int:
    return sum(rule["packets_matched"] for rule in stats["rules"] if rule["rule_id"] in rule_ids)


@pytest.fixture
def relay(line: Line, start_relay: StartRelay) -> Relay:
    """Outputs on `right` that will fail, and on `spare` that will not."""
    _, host, sink = line.hosts
    connect(host, "spare", "10.3.0.1/24", sink, "spare", "10.3.0.2/24")
    relay = start_relay(host, ("left",), 1, "--ring-mib", "128")  # 4 s of traffic: the machine may be busy
    relay.add("sick", IN, SICK, UNICAST, BESIDE)
    relay.add("preserving", IN, PRESERVED, options=("--preserve-source",))
    relay.add("other", OTHER_IN, OTHER)
    relay.add("silent", SILENT_IN, SILENT, UNROUTED)
    return relay


def test_a_failing_output_is_counted_under_its_cause_harms_no_other_and_recovers(
    line: Line, relay: Relay, tmp_path: Path
) -> None:
    """One fault after the other under traffic. What an output counts as sent has left, in order."""
    gen, host, sink = line.hosts
    left = ("--interface", "left", "--group", "239.2.2.1")
    host.ip("route", "add", "unreachable", "10.2.0.98/32")  # looked for on the output's link all the same
    set_queue(host, FAST, ENDLESS, "add")
    with receiver(sink, tmp_path, *left) as received:
        with streams(line, relay, tmp_path):
            refuse_by_firewall(relay, host)
            fill_queue(relay, host, "10mbit", 1)
            fill_queue(relay, host, "1mbit", 10)
            relay.wait_for_log("[Warning] [Supervisor] Interface right dropped ")
        summary = received.drain()
    assert (summary["reordered"], summary["duplicated"], summary["corrupt"]) == (0, 0, 0)
    assert summary["datagrams"] == output_packets(relay)[SICK]
    assert summary["lost"] == sum(output_drops(relay)[SICK].values())
    with sender(gen, tmp_path, "--interface", "right", "--rate", str(SILENT_PPS), "--group", "239.1.1.3"):
        with streams(line, relay, tmp_path) as sending:
            fill_send_buffer(relay, host)
            with receiver(sink, tmp_path, *left) as received:
                change_mtu(relay, host)
                sending.interrupt()
                summary = received.drain()
        assert summary["datagrams"] > FELT
        assert (summary["lost"], summary["reordered"], summary["duplicated"], summary["corrupt"]) == (0, 0, 0, 0)
        answer_arp(relay, sink)
    relay.assert_accounted()
    text = relay.stop()
    assert text.count("No ARP answer from") == 2
    assert "Interface spare dropped" not in text
