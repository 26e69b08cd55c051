"""A worker that was taken over spoils its counters, or truncates its files: the supervisor tells counts and goes on."""

import contextlib
import os
import struct
from pathlib import Path

import pytest

from relay.dataplane.layout import STATS_BYTES, STATS_HEADER, offset_of
from tests.fuzz.scribbler import scribbling
from tests.system.conftest import StartRelay
from tests.system.harness import Relay, wait_until
from tools.netns import Line

SHM = Path("/dev/shm")
WORKERS = 2
COUNT_MAX = (1 << 63) - 1
DOORBELL = offset_of(STATS_HEADER, "doorbell")
RELEASE = offset_of(STATS_HEADER, "release")
SPARED = ("--spared", str(DOORBELL), str(RELEASE + 8))  # what the honest worker behind it obeys
ROUNDS = 4
SAMPLES_S = 2.5  # rates are of the last two samples, taken once a second


@pytest.fixture
def relay(line: Line, start_relay: StartRelay) -> Relay:
    relay = start_relay(line.hosts[1], ("left",), WORKERS)
    for number in range(3):
        relay.add(
            f"r{number}",
            f"239.1.1.{number + 1}:5001",
            f"239.2.2.{number + 1}:6001:right",
            f"10.2.0.1:{7000 + number}:right",
        )
    return relay


def segments(relay: Relay) -> list[Path]:
    return [SHM / f"mcr_{relay.instance}_dp_c{core}_stats" for core in Relay.cores(WORKERS)]


def fill(relay: Relay, number: int) -> None:
    """Put a number in the place of every counter of every worker."""
    raw = struct.pack("<q", number)
    for segment in segments(relay):
        with segment.open("r+b") as file:
            file.write(raw * (RELEASE // 8))
            file.seek(RELEASE + 8)
            file.write(raw * ((STATS_BYTES - RELEASE - 8) // 8))


def assert_it_goes_on(relay: Relay) -> None:
    """Everything can be asked and changed; what is told are counts."""
    stats = relay.stats()
    workers = relay.ask("list-workers")
    assert len(workers) == WORKERS
    for told in (stats, *workers, *stats["rules"]):
        for key, value in told.items():
            if isinstance(value, int | float):
                assert 0 <= value < 1 << 70, (key, value)
    for told in (stats, *workers):
        assert all(0 <= count <= COUNT_MAX for count in told["drops"].values()), told["drops"]
    assert relay.control("get-stats").returncode == 0
    assert relay.control("list-workers").returncode == 0
    relay.add("more", "239.1.1.9:5001", "239.2.2.9:6001:right")
    relay.ask("remove-rule", "more")
    assert relay.process.poll() is None, relay.text()
    assert "failed" not in relay.text()
    assert "Warning:" not in relay.text()  # as Python prints its own


@pytest.mark.parametrize("number", [-(1 << 63), COUNT_MAX, -1], ids=["least", "greatest", "minus one"])
def test_numbers_at_the_limits_are_told_as_counts(relay: Relay, number: int) -> None:
    began_s = relay.stats()["uptime_s"]
    fill(relay, number)
    assert_it_goes_on(relay)
    wait_until(lambda: relay.stats()["uptime_s"] > began_s + SAMPLES_S, "two samples were taken")
    assert_it_goes_on(relay)


@pytest.mark.parametrize("length", [0, 4096, 10_000])
def test_a_worker_that_truncates_its_segments_harms_nobody_else(relay: Relay, length: int) -> None:
    """It owns the files, so it can; the supervisor maps them."""
    core = Relay.cores(WORKERS)[-1]
    files = sorted(SHM.glob(f"mcr_{relay.instance}_dp_c{core}_*"))
    assert len(files) == 5
    began_s = relay.stats()["uptime_s"]
    for file in files:
        os.truncate(file, length)
    wait_until(lambda: relay.stats()["uptime_s"] > began_s + SAMPLES_S, "it is read all the time")
    assert_it_goes_on(relay)
    assert len([worker for worker in relay.ask("list-workers") if worker["state"] == "running"]) >= WORKERS - 1
    relay.stop()


def test_a_worker_that_scribbles_in_its_counters_harms_nobody(relay: Relay) -> None:
    with contextlib.ExitStack() as stack:
        for segment in segments(relay):
            stack.enter_context(scribbling(segment, *SPARED))
        for _ in range(ROUNDS):
            assert_it_goes_on(relay)
    fill(relay, 0)
    wait_until(lambda: relay.stats()["packets_relayed"] == 0, "counters are read as they are")
    relay.stop()
