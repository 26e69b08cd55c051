"""Streams through the relay arrive whole, in order and unaltered.

gen ──left── relay ──right── sink        10.1.0.0/24, 10.2.0.0/24
"""

from pathlib import Path

import pytest

from tests.system.conftest import StartRelay
from tests.system.harness import assert_perfect, receiving, send
from tools.netns import Line

DATAGRAMS = 60_000
RATE = "50000"
ROOMY = ("--ring-mib", "64")  # this machine's other load must not decide the test


@pytest.mark.parametrize(("streams", "workers"), [(1, 1), (50, 2), (200, 1), (200, 2)])
def test_streams_arrive_whole_and_in_order(
    line: Line, start_relay: StartRelay, tmp_path: Path, streams: int, workers: int
) -> None:
    gen, host, sink = line.hosts
    relay = start_relay(host, ("left",), workers, *ROOMY)
    relay.add_many(tmp_path, [(f"r{i}", f"239.1.1.{i}:5001", f"239.2.2.{i}:6001:right") for i in range(1, streams + 1)])
    flows = ("--flows", str(streams), "--flow-by", "group")
    to, received_at = ("--group", "239.1.1.1", "--port", "5001"), ("--group", "239.2.2.1", "--port", "6001")
    with receiving(sink, tmp_path, "--interface", "left", *flows, *received_at) as summary:
        send(gen, "--interface", "right", "--rate", RATE, "--count", str(DATAGRAMS), *flows, *to)
        result = summary(DATAGRAMS)
    assert_perfect(result, DATAGRAMS)
    assert result["flows"] == streams
    stats = relay.assert_accounted()
    assert stats["packets_relayed"] == DATAGRAMS
    relay.stop()


@pytest.mark.parametrize("workers", [1, 2])
def test_one_input_leaves_through_fifty_outputs(
    line: Line, start_relay: StartRelay, tmp_path: Path, workers: int
) -> None:
    gen, host, sink = line.hosts
    relay = start_relay(host, ("left",), workers, *ROOMY)
    relay.add("fanout", "239.1.1.1:5001", *(f"239.2.2.{i}:6001:right" for i in range(1, 51)))
    copies = ("--flows", "50", "--flow-by", "group", "--group", "239.2.2.1", "--port", "6001")
    with receiving(sink, tmp_path, "--interface", "left", *copies) as summary:
        send(gen, "--interface", "right", "--rate", "2000", "--count", "10000", "--flows", "4")
        result = summary(50 * 10_000)
    assert_perfect(result, 50 * 10_000)
    assert result["flows"] == 50 * 4
    relay.assert_accounted()


def test_three_inputs_leave_through_one_output(line: Line, start_relay: StartRelay, tmp_path: Path) -> None:
    gen, host, sink = line.hosts
    relay = start_relay(host, ("left",), 2, *ROOMY)
    relay.add_many(tmp_path, [(f"r{i}", f"239.1.1.{i}:5001", "239.2.2.2:6001:right") for i in (1, 2, 3)])
    with receiving(sink, tmp_path, "--interface", "left") as summary:
        flows = ("--flows", "3", "--flow-by", "group")
        send(gen, "--interface", "right", "--rate", RATE, "--count", str(DATAGRAMS), *flows)
        result = summary(DATAGRAMS)
    assert_perfect(result, DATAGRAMS)
    assert result["flows"] == 3
    relay.assert_accounted()


def test_a_chain_of_three_relays_loses_nothing(start_relay: StartRelay, tmp_path: Path) -> None:
    with Line("gen", "r1", "r2", "r3", "sink") as line:
        gen, *hosts, sink = line.hosts
        relays = [start_relay(host, ("left",), workers, *ROOMY) for host, workers in zip(hosts, (1, 2, 1), strict=True)]
        for i, relay in enumerate(relays, 1):
            relay.add("hop", f"239.{i}.1.1:5001", f"239.{i + 1}.1.1:5001:right")
        at_end = ("--group", "239.4.1.1", "--port", "5001")
        with receiving(sink, tmp_path, "--interface", "left", *at_end) as summary:
            send(gen, "--interface", "right", "--rate", "20000", "--count", str(DATAGRAMS), "--flows", "2")
            result = summary(DATAGRAMS)
        assert_perfect(result, DATAGRAMS)
        for relay in relays:
            relay.assert_accounted()


def test_datagrams_of_all_sizes_arrive_whole(line: Line, start_relay: StartRelay, tmp_path: Path) -> None:
    gen, host, sink = line.hosts
    relay = start_relay(host, ("left",), 1, *ROOMY)
    relay.add("r1", "239.1.1.1:5001", "239.2.2.2:6001:right")
    with receiving(sink, tmp_path, "--interface", "left") as summary:
        send(gen, "--interface", "right", "--rate", "2000", "--count", "5000", "--size", "0-65507")
        result = summary(5000)
    assert_perfect(result, 5000)
    relay.assert_accounted()


def test_small_datagrams_sent_singly_arrive_whole(line: Line, start_relay: StartRelay, tmp_path: Path) -> None:
    gen, host, sink = line.hosts
    relay = start_relay(host, ("left",), 2, *ROOMY)
    relay.add("r1", "239.1.1.1:5001", "239.2.2.2:6001:right")
    with receiving(sink, tmp_path, "--interface", "left") as summary:
        sizes = ("--size", "32-1472", "--no-gso", "--flows", "7")
        send(gen, "--interface", "right", "--rate", RATE, "--count", str(DATAGRAMS), *sizes)
        result = summary(DATAGRAMS)
    assert_perfect(result, DATAGRAMS)
    relay.assert_accounted()


@pytest.mark.parametrize(
    "options",
    [
        ("--idle", "sleep"),
        ("--idle", "spin"),
        ("--fanout", "cpu"),
        ("--fanout", "qm"),
        ("--log-format", "json", "--log-level", "debug"),
    ],
    ids=lambda options: options[1],
)
def test_every_way_of_waiting_and_sharing_loses_nothing(
    line: Line, start_relay: StartRelay, tmp_path: Path, options: tuple[str, ...]
) -> None:
    gen, host, sink = line.hosts
    workers = 1 if "spin" in options else 2  # two that spin leave no core to anybody else here
    relay = start_relay(host, ("left",), workers, *ROOMY, *options)
    relay.add("r1", "239.1.1.1:5001", "239.2.2.2:6001:right")
    with receiving(sink, tmp_path, "--interface", "left") as summary:
        send(gen, "--interface", "right", "--rate", "10000", "--count", "20000", "--flows", "4")
        result = summary()
    faults = ("lost", "duplicated", "corrupt", "foreign")  # only the hash keeps a flow on one worker, so in order
    assert {key: result[key] for key in faults} == dict.fromkeys(faults, 0)
    assert relay.assert_accounted()["packets_relayed"] == 20_000
    relay.stop()
