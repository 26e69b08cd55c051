"""A relay and its traffic in network namespaces, for system tests. Real processes, real sockets.

with Line("gen", "relay", "sink") as line: Relay(line.hosts[1], …)
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from relay.api import GetStats
from relay.client import Client
from tools.environment import CHECKOUT
from tools.netns import Host, Line

PYTHON = sys.executable
BIN = Path(sys.executable).parent
DEADLINE_S = 60.0
POLL_S = 0.02
SERVES = "Control plane worker started"
TOOK_OVER = "Took over from supervisor"
RING_MIB = 64  # 0.6 s at 50 000 datagrams/s
PPS = 50_000
STOP_S = 15.0  # a stop takes under 2 s; the machine may be busy


def wait_until(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """Poll until `condition` gives something true; return it."""
    end_s = time.monotonic() + deadline_s
    while not (result := condition()):
        assert time.monotonic() < end_s, f"did not happen within {deadline_s} s: {what}"
        time.sleep(POLL_S)
    return result


class Relay:
    """A running mcrd in a namespace."""

    serial = 0

    def __init__(self, host: Host, folder: Path, interfaces: Sequence[str], workers: int = 1, *options: str) -> None:
        Relay.serial += 1
        self.host = host
        self.instance = f"test{os.getpid()}-{Relay.serial}"
        self.log = folder / f"{self.instance}.log"
        self.socket = folder / f"{self.instance}.sock"
        self.options = [word for interface in interfaces for word in ("--interface", interface)]
        self.options += ["--num-workers", str(workers), *options]
        if "--ring-mib" not in options:  # the machine may be busy with other things for a moment
            self.options += ["--ring-mib", str(RING_MIB)]
        self.behind: Sequence[str] = ()  # a program such as setpriv, which executes mcrd
        self.log.touch()
        self.process = self.launch(self.options)
        try:
            for core in self.cores(workers):
                self.wait_for_log(f"Data plane worker started on core {core}")
        except BaseException:
            self.kill()
            raise

    def launch(self, options: Sequence[str]) -> "subprocess.Popen[str]":
        """Start an mcrd of this name and these options; what it says goes to the log."""
        command = [*self.behind, str(BIN / "mcrd"), "--socket", str(self.socket), "--instance", self.instance, *options]
        with self.log.open("a") as out:
            return self.host.popen(command, stdout=out, stderr=subprocess.STDOUT)

    def start_again(self, options: Sequence[str] | None = None) -> None:
        """Start the next supervisor, with these options or the same; it serves then, and no former worker runs."""
        served = self.text().count(SERVES)
        taken = self.text().count(TOOK_OVER)
        self.process = self.launch(self.options if options is None else options)
        wait_until(lambda: self.text().count(SERVES) > served or self.process.poll() is not None, "the next one serves")
        assert self.process.poll() is None, self.text()
        if "rules that it left" in self.text():
            wait_until(lambda: self.text().count(TOOK_OVER) > taken or "were ended" in self.text(), "it took over")

    @staticmethod
    def cores(workers: int) -> list[int]:
        """The cores that workers get by default."""
        return sorted(os.sched_getaffinity(0))[:workers]

    @property
    def pid(self) -> int:
        """The pid of mcrd itself: `ip netns exec` becomes the program."""
        return self.process.pid

    def text(self) -> str:
        """The log so far."""
        return self.log.read_text()

    def wait_for_log(self, text: str) -> None:
        """Wait until a line with `text` is there."""
        wait_until(lambda: text in self.text() or self.process.poll() is not None, f"log line {text!r}")
        assert text in self.text(), self.text()

    def control(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run mcrctl; whatever its exit code."""
        command = [str(BIN / "mcrctl"), "--socket", str(self.socket), *arguments]
        return self.host.run(command, capture_output=True)

    def ask(self, *arguments: str) -> Any:
        """Run mcrctl --json and return its answer."""
        result = self.control(*arguments, "--json")
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    def add(self, rule_id: str, group_port: str, *outputs: str, options: Sequence[str] = ()) -> None:
        """Add a rule from `group:port` to outputs."""
        group, port = group_port.split(":")
        arguments = ["--rule-id", rule_id, "--input-group", group, "--input-port", port, *options]
        arguments += [word for output in outputs for word in ("--output", output)]
        self.ask("add-rule", *arguments)

    def add_many(self, folder: Path, rules: Sequence[tuple[str, str, str]]) -> None:
        """Add (id, `group:port`, output) rules in one request."""
        lines = []
        for rule_id, group_port, output in rules:
            group, port = group_port.split(":")
            lines += ["[[rules]]", f'rule_id = "{rule_id}"', f'input_group = "{group}"', f"input_port = {port}"]
            lines += [f'outputs = ["{output}"]']
        file = folder / "rules.toml"
        file.write_text("\n".join(lines))
        self.ask("add-rule", "--file", str(file))

    def stats(self) -> Any:
        """What get-stats answers; asked without starting mcrctl, as this is asked again and again."""
        with Client(self.socket) as client:
            return client.ask(GetStats()).result

    def assert_accounted(self) -> Any:
        """Every datagram that came in left, or is counted under a cause: in equals out plus drops. Returns stats."""
        stats = self.stats()
        before_match = ("truncated", "parse_error", "fragment", "checksum", "no_match", "own_egress")
        assert stats["packets_in"] == stats["packets_matched"] + sum(stats["drops"][cause] for cause in before_match)
        for rule in stats["rules"]:
            given = rule["packets_matched"] - sum(rule["drops"].values())
            for output in rule["outputs"]:
                assert given == output["packets"] + sum(output["drops"].values()), rule["rule_id"]
        return stats

    def kill_family(self) -> None:
        """End the supervisor and all its children by SIGKILL, as a power cut would."""
        family = [psutil.Process(self.pid), *psutil.Process(self.pid).children(recursive=True)]
        for process in family:
            process.kill()
        self.process.wait()
        psutil.wait_procs(family, timeout=STOP_S)

    def stop(self) -> str:
        """Stop as Ctrl-C does; nothing may be left. Returns the log."""
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(10) == 0, self.text()
        assert self.leftovers() == []
        return self.text()

    def kill_orphans(self) -> None:
        """End what a killed supervisor left running."""
        inventory = self.socket.with_suffix(".inventory")
        if not inventory.exists():
            return
        kept = json.loads(inventory.read_text())
        for pid in (kept["template"]["pid"], *(worker["pid"] for worker in kept["workers"])):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def leftovers(self) -> list[str]:
        """What of this relay still exists."""
        segments = [str(path) for path in Path("/dev/shm").glob(f"mcr_{self.instance}_*")]
        files = [
            self.socket,
            *(self.socket.with_suffix(suffix) for suffix in (".handover", ".handover-next", ".inventory", ".state")),
        ]
        return segments + [str(file) for file in files if file.exists()]

    def kill(self) -> None:
        """End it whatever its state, for teardown."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.kill_orphans()
        for leftover in self.leftovers():
            print(f"--- left by {self.instance}: {leftover}")
            Path(leftover).unlink()
        print(f"--- log of {self.instance} ---\n{self.text()}")  # shown when the test failed


def template_of(relay: Relay) -> psutil.Process:
    """The process that the relay's workers are forked from."""
    children = psutil.Process(relay.pid).children()
    return next(child for child in children if "relay.dataplane.template" in child.cmdline())


class Tool:
    """A running send_mcast.py or recv_mcast.py: ready, that is, sending or joined."""

    def __init__(self, host: Host, script: str, folder: Path, *options: str) -> None:
        self._out = folder / f"{script}-{len(list(folder.iterdir()))}"
        command = [PYTHON, f"tools/{script}.py", "--ready", "--quiet", "--json", *options]
        with self._out.open("w") as out:
            self.process = host.popen(command, stdin=subprocess.PIPE, stdout=out, cwd=CHECKOUT)
        wait_until(lambda: "ready" in self._out.read_text() or self.process.poll() is not None, f"{script} is ready")

    def summary(self) -> Any:
        """What it says at its end."""
        self.process.wait(DEADLINE_S)
        return json.loads(self._out.read_text().splitlines()[-1])

    def interrupt(self) -> Any:
        """End it as Ctrl-C does; return its summary."""
        self.process.send_signal(signal.SIGINT)
        return self.summary()

    def drain(self, sent: int | None = None) -> Any:
        """End a receiver when so many datagrams have come, or nothing comes any more; return its summary."""
        if sent is None:
            self.process.terminate()
        else:
            assert self.process.stdin is not None
            self.process.stdin.write(f"{sent}\n")
            self.process.stdin.flush()
        return self.summary()

    def end(self) -> None:
        """End it whatever its state."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()


@contextlib.contextmanager
def receiver(host: Host, folder: Path, *options: str) -> Iterator[Tool]:
    """A recv_mcast.py that has joined, and has ended after the block."""
    tool = Tool(host, "recv_mcast", folder, "--told", *options)
    try:
        assert tool.process.poll() is None
        yield tool
    finally:
        tool.end()


@contextlib.contextmanager
def sender(host: Host, folder: Path, *options: str) -> Iterator[Tool]:
    """A send_mcast.py that sends from before the block, and has ended after it."""
    tool = Tool(host, "send_mcast", folder, *options)
    try:
        yield tool
    finally:
        tool.end()


@contextlib.contextmanager
def receiving(host: Host, folder: Path, *options: str) -> Iterator[Callable[..., Any]]:
    """Run recv_mcast.py; in the block it has joined.

    Gives a function for its summary, when all has been sent. It takes the number of datagrams that are to come, for
    which it waits: without, it waits until nothing comes any more.
    """
    with receiver(host, folder, *options) as tool:
        yield tool.drain


@contextlib.contextmanager
def relayed_whole(line: Line, folder: Path, *options: str) -> Iterator[None]:
    """Traffic at PPS from before the block until after it: it arrives whole, in order, once.

    `options` are for the sender.
    """
    gen, _, sink = line.hosts
    to = ("--interface", "right", "--rate", str(PPS), *options)
    with receiver(sink, folder, "--interface", "left") as received, sender(gen, folder, *to) as sent:
        yield
        count = sent.interrupt()["datagrams"]
        assert_perfect(received.drain(count), count)


def relay_some(line: Line, folder: Path, count: int, *options: str) -> None:
    """So many datagrams at PPS arrive whole, in order, once; `options` for the sender."""
    gen, _, sink = line.hosts
    with receiver(sink, folder, "--interface", "left") as received:
        send(gen, "--interface", "right", "--rate", str(PPS), "--count", str(count), *options)
        assert_perfect(received.drain(count), count)


def send(host: Host, *options: str) -> Any:
    """Run send_mcast.py to its end; return its summary."""
    command = [PYTHON, "tools/send_mcast.py", "--quiet", "--json", *options]
    result = host.run(command, stdout=subprocess.PIPE, cwd=CHECKOUT)
    assert result.returncode == 0
    return json.loads(result.stdout)


def assert_perfect(summary: Any, datagrams: int) -> None:
    """Nothing lost, altered, doubled or reordered in any flow."""
    wrong = {key: summary[key] for key in ("lost", "duplicated", "reordered", "corrupt", "foreign")}
    assert wrong == dict.fromkeys(wrong, 0)
    assert summary["datagrams"] == datagrams
