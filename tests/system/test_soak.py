"""Every fault again and again, at random, under traffic: nothing is lost, reordered or altered, nothing stays behind.

`make soak ARGS="--minutes 60"` runs it for an hour. The order of faults follows from MCR_SOAK_SEED, which is printed.
"""

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.system.conftest import StartRelay
from tests.system.harness import Relay, receiving, send, wait_until
from tools.netns import Line

SECONDS = 15.0
RING_MIB = "512"
SEED = int(os.environ.get("MCR_SOAK_SEED", "1"))
PPS = 50_000
IN, OUT = "239.1.1.1:5001", "239.2.2.2:6001:right"
PASS_DATAGRAMS_MAX = 4096  # what a killed worker may have sent without having written it down


class Faults:
    """What can happen to a relay; each waits until the relay has got over it."""

    def __init__(self, relay: Relay, folder: Path) -> None:
        self.relay = relay
        self.folder = folder
        self.number = 0
        self.workers_killed = 0

    def _child(self, module: str) -> psutil.Process | None:
        for process in psutil.Process(self.relay.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if module in process.cmdline():
                    return process
        return None

    def _kill(self, module: str) -> None:
        former = wait_until(lambda: self._child(module), f"{module} runs")  # none does while a supervisor starts
        former.kill()
        wait_until(lambda: (child := self._child(module)) is not None and child.pid != former.pid, f"another {module}")

    def _pid(self) -> int:
        return int(self.relay.ask("list-workers")[0]["pid"])

    def _worker(self) -> int:
        return int(wait_until(self._pid, "a worker runs"))

    def _wait_for_another(self, former: int) -> None:
        def is_another() -> bool:
            result = self.relay.control("list-workers")
            return result.returncode == 0 and self._pid() not in (0, former)

        wait_until(is_another, "another worker runs")

    def kill_worker(self) -> None:
        """As by the kernel's OOM killer."""
        pid = self._worker()
        self.workers_killed += 1
        os.kill(pid, signal.SIGKILL)
        self._wait_for_another(pid)

    def kill_control_plane(self) -> None:
        """Clients come back."""
        self._kill("relay.controlplane")
        wait_until(lambda: self.relay.control("ping").returncode == 0, "control plane answers")

    def kill_template(self) -> None:
        """Workers don't notice."""
        self._kill("relay.dataplane.template")

    def kill_supervisor(self) -> None:
        """The next one takes over."""
        former = self._worker()
        self.relay.process.kill()
        self._start_again(former)

    def _start_again(self, former: int) -> None:
        relay = self.relay
        relay.process.wait()
        relay.process = relay.launch(relay.options)
        self._wait_for_another(former)

    def kill_supervisor_and_template(self) -> None:
        """At once: no other template is started. The next one takes what it needs from the worker."""
        former, template = self._worker(), wait_until(lambda: self._child("relay.dataplane.template"), "a template")
        self.relay.process.send_signal(signal.SIGSTOP)
        template.kill()
        self.relay.process.kill()
        self._start_again(former)

    def kill_supervisor_and_worker(self) -> None:
        """At once: nobody relays until the next one does. The template waits for it, and the ring fills."""
        former = self._worker()
        self.workers_killed += 1
        self.relay.process.send_signal(signal.SIGSTOP)
        os.kill(former, signal.SIGKILL)
        self.relay.process.kill()
        self._start_again(former)

    def restart(self) -> None:
        """As after an upgrade."""
        assert self.relay.control("restart", "--graceful").returncode == 0

    def change_rules(self) -> None:
        """Another rule comes, one changes, one goes."""
        self.number += 1
        self.relay.add(f"other{self.number}", "239.1.3.3:5001", f"239.2.3.{1 + self.number % 250}:6001:right")
        self.relay.add("kept", IN, OUT, f"239.2.4.{1 + self.number % 250}:6001:right", options=("--replace",))
        self.relay.ask("remove-rule", f"other{self.number}")

    def trace(self) -> None:
        """A record for each packet, for a moment."""
        for level in ("debug", "info"):
            self.relay.ask("log-level", "set", level)

    def all(self) -> list[Callable[[], None]]:
        """Every fault."""
        return [
            self.kill_worker, self.kill_control_plane, self.kill_template, self.kill_supervisor, self.restart,
            self.change_rules, self.trace, self.kill_supervisor_and_template, self.kill_supervisor_and_worker,
        ]  # fmt: skip


def test_faults_at_random_lose_nothing(
    line: Line, start_relay: StartRelay, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    seconds = request.config.getoption("--minutes") * 60 or SECONDS
    gen, host, sink = line.hosts
    # Where a worker dies with its template or its supervisor, nobody relays until the next one has started, which takes
    # two seconds, and more on a busy machine. The ring holds five.
    relay = start_relay(host, ("left",), 1, "--ring-mib", RING_MIB)
    relay.add("kept", IN, OUT)
    faults, chance = Faults(relay, tmp_path), random.Random(SEED)
    count = int(seconds * PPS)
    with receiving(sink, tmp_path, "--interface", "left") as summary:
        to = ("--interface", "right", "--rate", str(PPS), "--count", str(count), "--no-gso")
        sending = threading.Thread(target=send, args=(gen, *to))
        sending.start()
        end_s = time.monotonic() + seconds
        happened: list[str] = []
        while time.monotonic() < end_s:
            fault = chance.choice(faults.all())
            happened.append(fault.__name__)
            fault()
        sending.join()
        found = summary()
    print(f"seed {SEED}: {', '.join(happened)}")
    assert {key: found[key] for key in ("lost", "reordered", "corrupt", "foreign")} == dict.fromkeys(
        ("lost", "reordered", "corrupt", "foreign"), 0
    )
    assert found["datagrams"] - found["duplicated"] == count
    assert found["duplicated"] <= faults.workers_killed * PASS_DATAGRAMS_MAX
    assert len(happened) > 3
    relay.stop()
