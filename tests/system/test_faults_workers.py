"""Workers that are killed, hang, or die again and again, under traffic.

gen ──left── relay ──right── sink        10.1.0.0/24, 10.2.0.0/24
"""

import contextlib
import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil

from tests.system.conftest import StartRelay
from tests.system.harness import DEADLINE_S, Relay, assert_perfect, receiving, send, wait_until
from tools.netns import Host, Line

PPS = 50_000
KILLS = 20
IN, OUT = "239.1.1.1:5001", "239.2.2.2:6001:right"
PASS_DATAGRAMS_MAX = 4096
RING_OF_A_SECOND = ("--ring-mib", "128")  # 65 536 frames
FLOWS = 64


@contextlib.contextmanager
def traffic(gen: Host, count: int, *options: str) -> Iterator[threading.Thread]:
    """Datagrams at PPS while the block runs, and until all are sent."""
    to = ("--interface", "right", "--rate", str(PPS), "--count", str(count), *options)
    sending = threading.Thread(target=send, args=(gen, *to))
    sending.start()
    try:
        yield sending
    finally:
        sending.join()


def relayed(relay: Relay) -> int:
    return int(relay.stats()["packets_relayed"])


def has_relayed(relay: Relay, goal: int) -> bool:
    return relayed(relay) >= goal


def test_twenty_kills_at_any_moment_lose_and_reorder_nothing(
    line: Line, start_relay: StartRelay, tmp_path: Path
) -> None:
    gen, host, sink = line.hosts
    relay = start_relay(host, ("left",), 1, "--ring-mib", "64")
    relay.add("r", IN, OUT)
    chance, count = random.Random(20), 600_000
    killed: list[int] = []
    with receiving(sink, tmp_path, "--interface", "left", "--idle-timeout", "2") as summary:
        with traffic(gen, count) as sending:
            while sending.is_alive() and len(killed) < KILLS:
                goal = relayed(relay) + chance.randrange(1, 5000)
                wait_until(partial(has_relayed, relay, goal), "traffic flows")
                pid = relay.ask("list-workers")[0]["pid"]
                if pid and pid not in killed:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
        found = summary()
    assert len(killed) == KILLS
    assert {key: found[key] for key in ("lost", "reordered", "corrupt")} == {"lost": 0, "reordered": 0, "corrupt": 0}
    assert found["duplicated"] <= KILLS * PASS_DATAGRAMS_MAX
    for pid in killed:
        relay.wait_for_log(f"pid {pid}, signal SIGKILL; it last logged: ")
    assert relay.text().count("[Critical] [Supervisor] Worker process exited unexpectedly") == KILLS
    relay.stop()


def test_a_hanging_worker_is_killed_and_nothing_is_lost(line: Line, start_relay: StartRelay, tmp_path: Path) -> None:
    gen, host, sink = line.hosts
    relay = start_relay(host, ("left",), 1, *RING_OF_A_SECOND)
    relay.add("r", IN, OUT)
    with receiving(sink, tmp_path, "--interface", "left", "--idle-timeout", "3") as summary:
        with traffic(gen, 150_000):
            wait_until(lambda: relayed(relay) > 1000, "traffic flows")
            (worker,) = relay.ask("list-workers")
            os.kill(worker["pid"], signal.SIGSTOP)
            relay.wait_for_log(f"[Error] [Supervisor] The worker of core {worker['core']} hangs, killed")
            relay.wait_for_log(f"pid {worker['pid']}, signal SIGKILL")
        assert_perfect(summary(), 150_000)
    assert relay.assert_accounted()["drops"]["ring_full"] == 0
    relay.stop()


def test_an_idle_worker_is_not_taken_for_a_hanging_one(line: Line, start_relay: StartRelay) -> None:
    relay = start_relay(line.hosts[1], ("left",), 2)
    pids = [worker["pid"] for worker in relay.ask("list-workers")]
    beats = [worker["uptime_s"] for worker in relay.ask("list-workers")]
    wait_until(lambda: all(w["uptime_s"] > b + 2 for w, b in zip(relay.ask("list-workers"), beats, strict=True)), "2 s")
    assert [worker["pid"] for worker in relay.ask("list-workers")] == pids
    relay.stop()


class Killer:
    """Kills each worker of a core as soon as it is there, until told to stop."""

    def __init__(self, relay: Relay, core: int) -> None:
        self._template = next(
            child for child in psutil.Process(relay.pid).children() if "relay.dataplane.template" in child.cmdline()
        )
        self._core = core
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.wait(0.001):
            for worker in self._template.children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if worker.cpu_affinity() == [self._core]:
                        worker.kill()

    def __enter__(self) -> "Killer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def test_a_worker_that_keeps_dying_gives_its_traffic_to_the_others_and_comes_back(
    line: Line, start_relay: StartRelay, tmp_path: Path
) -> None:
    gen, host, sink = line.hosts
    relay = start_relay(host, ("left",), 2)
    relay.add("r", IN, OUT)
    core = Relay.cores(2)[1]
    with Killer(relay, core):
        relay.wait_for_log(f"[Alert] [Supervisor] The worker of core {core} has died")
        with receiving(sink, tmp_path, "--interface", "left", "--idle-timeout", "2") as summary:
            with traffic(gen, 50_000, "--flows", str(FLOWS), "--flow-by", "source-port"):
                pass
            assert summary()["lost"] == 0
        deaths = relay.text().count(f"exited unexpectedly: core {core}")
        assert deaths < 20  # seconds have passed: it is started ever more seldom
    relay.wait_for_log(f"[Notice] [Supervisor] The worker of core {core} has recovered")
    before = {worker["core"]: worker["packets_relayed"] for worker in relay.ask("list-workers")}
    with receiving(sink, tmp_path, "--interface", "left", "--idle-timeout", "2") as summary:
        with traffic(gen, 50_000, "--flows", str(FLOWS), "--flow-by", "source-port"):
            pass
        assert summary()["lost"] == 0
    after = {worker["core"]: worker["packets_relayed"] for worker in relay.ask("list-workers")}
    assert all(after[core] > before[core] for core in after)
    relay.stop()


def test_the_only_worker_that_keeps_dying_is_said_and_started_again(line: Line, start_relay: StartRelay) -> None:
    relay = start_relay(line.hosts[1])
    (core,) = Relay.cores(1)
    with Killer(relay, core):
        relay.wait_for_log(f"[Alert] [Supervisor] The worker of core {core} has died")
    assert re.search(r"there is no other, its traffic is lost when its ring is full", relay.text())
    wait_until(lambda: relay.ask("list-workers")[0]["state"] == "running", "it runs again", DEADLINE_S)
    started = time.monotonic()
    wait_until(lambda: time.monotonic() > started + 1 and relay.ask("list-workers")[0]["pid"], "and stays")
    relay.stop()
