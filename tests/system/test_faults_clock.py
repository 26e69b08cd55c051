"""Steps of the wall clock: packets, intervals, rates and the order of the log follow CLOCK_MONOTONIC.

gen ──left── relay ──right── sink        10.1.0.0/24, 10.2.0.0/24

The machine's clock is not touched: clock.c is preloaded into the relay and shifts what its processes read.
"""

import re
import struct
import subprocess
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.system.conftest import StartRelay
from tests.system.harness import Relay, assert_perfect, receiving, send, wait_until
from tests.system.test_faults_host import Through
from tools.netns import Line

HOUR_NS = 3600 * 10**9
PPS = 5000
COUNT = 60_000
STEP = re.compile(r"^(\S+Z) \[\w+\] \[\w+\] (.*?)(?: core=\d+)? pid=(\d+) tid=\d+ seq=(\d+)", re.MULTILINE)
STATS_AFTER = 3  # reports after each step


class Clock:
    """What the relay's processes take for CLOCK_REALTIME: the machine's, shifted."""

    def __init__(self, folder: Path) -> None:
        self.library, self._file = folder / "clock.so", folder / "shift"
        source = Path(__file__).with_name("clock.c")
        build = ["cc", "-shared", "-fPIC", "-Wall", "-Werror", "-O1", "-o", str(self.library), str(source), "-ldl"]
        subprocess.run(build, check=True)
        self._file.write_bytes(bytes(8))

    def environment(self) -> list[str]:
        return ["env", f"LD_PRELOAD={self.library}", f"CLOCK_SHIFT={self._file}"]

    def step(self, shift_ns: int) -> None:
        with self._file.open("r+b") as file:
            file.write(struct.pack("@q", shift_ns))


def reports(relay: Relay) -> int:
    return relay.text().count("] Stats: in ")


def hours_off(moment: str) -> int:
    """How many hours the log's clock is off now."""
    return round((datetime.fromisoformat(moment) - datetime.now(UTC)).total_seconds() / 3600)


def test_the_shifted_clock_is_what_a_process_sees(tmp_path: Path) -> None:
    clock = Clock(tmp_path)
    clock.step(HOUR_NS)
    result = subprocess.run([*clock.environment(), "date", "+%s"], capture_output=True, text=True, check=True)
    assert abs(int(result.stdout) - time.time() - 3600) < 60


def test_steps_of_the_clock_change_no_interval_rate_or_order(
    line: Line, start_relay: StartRelay, tmp_path: Path
) -> None:
    gen, _, sink = line.hosts
    clock = Clock(tmp_path)
    host = Through(line.hosts[1], *clock.environment())
    options = ("--stats-interval-s", "1", "--log-timestamps", "--log-fields", "--ring-mib", "64")
    relay = start_relay(host, ("left",), 1, *options)
    began_s = time.monotonic()
    relay.add("r", "239.1.1.1:5001", "239.2.2.2:6001:right")
    (worker,) = relay.ask("list-workers")
    ages = [worker["uptime_s"]]
    hours = []
    with receiving(sink, tmp_path, "--interface", "left") as summary:
        to = ("--interface", "right", "--rate", str(PPS), "--count", str(COUNT))
        sending = threading.Thread(target=send, args=(gen, *to))
        sending.start()
        try:
            for shift_ns in (HOUR_NS, -HOUR_NS, 0):
                clock.step(shift_ns)
                goal = reports(relay) + STATS_AFTER
                wait_until(lambda goal=goal: reports(relay) >= goal, "reports go on")  # type: ignore[misc]
                ages.append(relay.ask("list-workers")[0]["uptime_s"])
                (rate,) = [rule["packets_per_second"] for rule in relay.stats()["rules"]]
                assert rate == pytest.approx(PPS, rel=0.8)  # by the wall clock it were 0, negative or thousandfold
                hours.append(hours_off(STEP.findall(relay.text())[-1][0]))
        finally:
            sending.join()
        assert_perfect(summary(COUNT), COUNT)
    lived_s = time.monotonic() - began_s
    assert reports(relay) <= lived_s + 2  # no burst to make up for an hour
    assert hours == [1, -1, 0]  # so it was stepped
    assert ages == sorted(ages)
    assert ages[-1] < lived_s + 10
    text = relay.stop()
    numbers: dict[str, list[int]] = {}
    for _, _, pid, number in STEP.findall(text):
        numbers.setdefault(pid, []).append(int(number))
    assert numbers[str(relay.pid)] == list(range(len(numbers[str(relay.pid)])))
