"""The demo: a generator, the relay and a receiver in network namespaces of their own, ten seconds, a table.

    gen ──239.1.1.1:5001──▶ relay ──239.2.2.2:6001──▶ sink

Run as `make demo`, as root; nothing is left afterwards.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tools.environment import CHECKOUT
from tools.netns import Host, Line

SECONDS = 10
RATE_PPS = 20_000
SETTLE_S_MAX = 30.0
PYTHON = sys.executable
RELAY = str(Path(sys.executable).with_name("mcrd"))
CONTROL = str(Path(sys.executable).with_name("mcrctl"))


def wait_for_line(path: Path, text: str) -> None:
    """Wait until a file holds a line with `text`. Raises TimeoutError."""
    deadline_s = time.monotonic() + SETTLE_S_MAX
    while text not in path.read_text():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{text!r} did not appear:\n{path.read_text()}")
        time.sleep(0.05)


@contextlib.contextmanager
def relay_on(host: Host, folder: Path) -> Iterator[Path]:
    """Run a relay on `host` until the end of the block; gives its control socket."""
    log, control = folder / "relay.log", folder / "control.sock"
    instance = f"demo-{os.getpid()}"
    command = [RELAY, "--interface", "left", "--socket", str(control), "--instance", instance]
    with log.open("w") as out, host.popen(command, stdout=out, stderr=subprocess.STDOUT) as process:
        try:
            wait_for_line(log, "Data plane worker started")
            yield control
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(10)


def measure(gen: Host, sink: Host, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Send and receive; return both summaries."""
    receive = [PYTHON, "tools/recv_mcast.py", "--interface", "left", "--idle-timeout", "1", "--ready", "--json"]
    send = [PYTHON, "tools/send_mcast.py", "--interface", "right", "--payload", "ts", "--json"]
    send += ["--rate", str(RATE_PPS), "--duration", str(SECONDS)]
    received = folder / "received"
    with received.open("w") as out, sink.popen([*receive, "--quiet"], stdout=out, cwd=CHECKOUT) as receiver:
        wait_for_line(received, "ready")
        sent = gen.run(send, stdout=subprocess.PIPE, cwd=CHECKOUT)
        receiver.wait(SETTLE_S_MAX)
    return json.loads(sent.stdout), json.loads(received.read_text().splitlines()[-1])


def show(sent: dict[str, Any], stats: dict[str, Any], received: dict[str, Any]) -> None:
    """The table."""
    table = Table("", "datagrams", "datagrams/s", title="239.1.1.1:5001 → relay → 239.2.2.2:6001")
    table.add_row("sent", f"{sent['datagrams']:,}", f"{sent['packets_per_second']:,}")
    table.add_row("relayed", f"{stats['packets_relayed']:,}", "")
    table.add_row("received", f"{received['datagrams']:,}", "")
    for key in ("lost", "duplicated", "reordered", "corrupt"):
        table.add_row(key, f"{received[key]:,}", "")
    latency = received["latency_us"]
    table.add_row("latency p50 / p99", f"{latency['p50']:.0f} / {latency['p99']:.0f} µs", "")
    Console().print(table)


def main() -> None:
    """Build, run, show; exit 1 when anything went wrong on the way."""
    if os.geteuid() != 0:
        sys.exit("demo: network namespaces need root: run `sudo make demo`")
    with tempfile.TemporaryDirectory() as name, Line("gen", "relay", "sink") as line:
        folder = Path(name)
        gen, relay, sink = line.hosts
        with relay_on(relay, folder) as control:
            client = [CONTROL, "--socket", str(control)]
            rule = ["--input-group", "239.1.1.1", "--input-port", "5001", "--output", "239.2.2.2:6001:right"]
            subprocess.run([*client, "add-rule", "--rule-id", "demo", *rule], check=True)
            sent, received = measure(gen, sink, folder)
            answer = subprocess.run([*client, "get-stats", "--json"], check=True, capture_output=True)
        show(sent, json.loads(answer.stdout), received)
    sys.exit(0 if received["ok"] and received["datagrams"] == sent["datagrams"] else 1)


if __name__ == "__main__":
    main()
