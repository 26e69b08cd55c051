"""How full packet rings are is told while it is so: by commands, metrics and top."""

import re
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from relay.cli.mcrctl import main
from tests.system.conftest import StartRelay
from tests.system.harness import Relay, sender, wait_until
from tools.netns import Line

OUTPUTS = 400  # a datagram takes a worker so many sends: a twentieth of what is sent here is more than it can do
FULL_PERCENT = 50


def fill(relay: Relay) -> Any:
    return relay.stats()["workers"][0]["ring_fill_percent"]


def wait_until_shown(relay: Relay, pattern: str, *command: str) -> None:
    """Run mcrctl, within this process, until a line of what it prints is like that."""

    def is_shown() -> object:
        result = CliRunner().invoke(main, ["--socket", str(relay.socket), *command])
        assert result.exit_code == 0, result.output
        return re.search(pattern, result.stdout, re.MULTILINE)

    wait_until(is_shown, f"{command[0]} shows {pattern}")


def test_a_worker_that_can_not_keep_up_has_a_ring_that_is_full_and_then_is_not(
    line: Line, start_relay: StartRelay, tmp_path: Path
) -> None:
    gen, host, _ = line.hosts
    relay = start_relay(host, ("left", "right"), 1, "--ring-mib", "1")
    core = relay.cores(1)[0]
    relay.add("wide", "239.1.1.1:5001", *(f"239.2.{i // 200}.{i % 200}:6001:right" for i in range(OUTPUTS)))
    assert fill(relay) == {"left": 0, "right": 0}
    with sender(gen, tmp_path, "--interface", "right", "--rate", "20000", "--size", "200", "--no-gso"):
        wait_until(lambda: fill(relay)["left"] >= FULL_PERCENT, "the ring fills")
        wait_until_shown(relay, rf"^rings: [1-9]\d* % full at most \(left, core {core}\)$", "get-stats")
        wait_until_shown(relay, r"  left [1-9]\d* %, right 0 %  ", "list-workers")
        gauge = rf'^mcr_worker_ring_fill_ratio{{core="{core}",interface="left"}} (0\.\d*[1-9]|1\.0)'
        wait_until_shown(relay, gauge, "metrics", "--once")
        wait_until_shown(relay, rf"^ +{core} +\d+ .* [1-9]\d* % (≥\d+|<50) ", "top", "--once")
    wait_until(lambda: fill(relay) == {"left": 0, "right": 0}, "the rings are empty again")
    assert relay.stats()["workers"][0]["ring_fill_max_percent"] >= FULL_PERCENT
