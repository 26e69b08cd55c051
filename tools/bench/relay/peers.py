"""The contenders: MCR, and what else moves multicast from one interface to another. Each starts and ends itself.

with peer.running(arena, Setup()) as running: …     running.pids for CPU time, running.output for a receiver
"""

import contextlib
import shutil
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.system.harness import Relay
from tools.addressing import spread
from tools.bench.relay.cpu import family
from tools.bench.relay.generator import GROUP, PORT
from tools.bench.relay.topology import Arena
from tools.environment import CHECKOUT

OUTPUT_GROUP = "239.2.0.1"
OUTPUT_PORT = 6001
OUTPUT_MAC = "01:00:5e:02:00:01"  # RFC 1112, of OUTPUT_GROUP
OUTPUT_ADDRESS = "10.2.0.1"
INPUT_ADDRESS = "10.1.0.2"
STOP_S = 10.0
CONTENDER_LOG = "contender.log"


@dataclass(frozen=True)
class Setup:
    """What a contender is asked to relay; only MCR does all of it."""

    rules: int = 1
    outputs: int = 1
    workers: int = 1
    idle: str = "adaptive"
    ring_mib: int = 64


@dataclass(frozen=True)
class Running:
    """A contender at work."""

    pids: Sequence[int] = ()  # all its processes
    workers: Sequence[int] = ()  # those that move packets
    output: tuple[str, int] = (OUTPUT_GROUP, OUTPUT_PORT)
    relay: Relay | None = field(default=None)


class Peer(ABC):
    """A contender."""

    name: str
    program: str = ""  # that must be installed
    package: str = ""  # Debian's, that has it

    def missing(self) -> str | None:
        """The line that says how to install it, None when it is there."""
        if not self.program or shutil.which(self.program):
            return None
        return f"{self.name} is not installed: apt-get install {self.package}"

    @abstractmethod
    def running(self, arena: Arena, setup: Setup) -> contextlib.AbstractContextManager[Running]:
        """Start, and end with the block."""


@contextlib.contextmanager
def process(arena: Arena, command: Sequence[str], pinned: bool = True) -> Iterator["subprocess.Popen[str]"]:
    """A process in the relay's host, on the relay's core, ended with the block."""
    core = ["taskset", "--cpu-list", str(arena.cores.relay)] if pinned else []
    with (arena.folder / CONTENDER_LOG).open("w") as log:
        options: dict[str, Any] = {"stdout": log, "stderr": log, "start_new_session": True}
        started = arena.relay_host.popen([*core, *command], cwd=CHECKOUT, **options)
    try:
        yield started
    finally:
        started.send_signal(signal.SIGTERM)
        try:
            started.wait(STOP_S)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


@contextlib.contextmanager
def nft_at_ingress(arena: Arena, rule: str) -> Iterator[None]:
    """A rule at the ingress hook of the relay's host, behind the packet tap. Raises RuntimeError with nft's words."""
    chain = f'chain ingress {{ type filter hook ingress device "left" priority 0; policy accept; {rule}; }}'
    ruleset = f"table netdev bench {{\n{chain}\n}}"
    result = arena.relay_host.run(["nft", "-f", "-"], input=ruleset, capture_output=True)
    if result.returncode:
        raise RuntimeError(f"nft: {result.stderr.strip()}")
    try:
        yield
    finally:
        arena.relay_host.run(["nft", "delete", "table", "netdev", "bench"])


class Mcr(Peer):
    """This relay."""

    name = "mcr"
    options: tuple[str, ...] = ()

    @contextlib.contextmanager
    def running(self, arena: Arena, setup: Setup) -> Iterator[Running]:
        config = arena.folder / "relay.toml"
        config.write_text(configuration(setup))
        options = ("--config", str(config), "--idle", setup.idle, "--ring-mib", str(setup.ring_mib), *self.options)
        relay = Relay(arena.relay_host, arena.folder, ("left",), setup.workers, *options)
        try:
            arena.wait_until_relayed(setup.rules if setup.rules <= 256 else 1, setup.outputs, relay.process)
            workers = [worker["pid"] for worker in relay.ask("list-workers")]
            yield Running(family(relay.pid), workers, relay=relay)
        finally:
            with contextlib.redirect_stdout(None):  # the log, which tests show
                relay.kill()


class McrExclusive(Mcr):
    """This relay with --exclusive: the host's own stack is spared what is relayed."""

    name = "mcr exclusive"
    program = "nft"  # and with it libnftables
    package = "nftables"
    options = ("--exclusive",)


def configuration(setup: Setup) -> str:
    """Rules for the generator's first groups, each to as many outputs, as a configuration file."""
    outputs = spread(OUTPUT_GROUP, OUTPUT_PORT, setup.outputs, "group")
    listed = ", ".join(f'"{group}:{port}:right"' for group, port in outputs)
    lines = []
    for group, port in spread(GROUP, PORT, setup.rules, "group"):
        lines += ["[[rules]]", f'input_group = "{group}"', f"input_port = {port}", f"outputs = [{listed}]"]
    return "\n".join(lines)


class Smcroute(Peer):
    """Multicast routing in the kernel: no rewriting, and what it does happens in the sender's time here."""

    name = "smcroute"
    program = "smcrouted"
    package = "smcroute"

    @contextlib.contextmanager
    def running(self, arena: Arena, setup: Setup) -> Iterator[Running]:
        config = arena.folder / "smcroute.conf"
        config.write_text(
            f"phyint left enable\nphyint right enable\nmgroup from left group {GROUP}\n"
            f"mroute from left group {GROUP} to right\n"
        )
        files = ("-f", config, "-P", arena.folder / "smcroute.pid", "-u", arena.folder / "smcroute.sock")
        with process(arena, ["smcrouted", "-n", "-N", *map(str, files)]) as started:
            arena.wait_until_relayed(1, 1, started)
            yield Running(family(started.pid), output=(GROUP, PORT))


class NftForward(Peer):
    """Static rewriting at the ingress hook, and no process at all."""

    name = "nft"
    program = "nft"
    package = "nftables"

    @contextlib.contextmanager
    def running(self, arena: Arena, setup: Setup) -> Iterator[Running]:
        rewrite = f"ether daddr set {OUTPUT_MAC} ip saddr set {OUTPUT_ADDRESS} ip daddr set {OUTPUT_GROUP}"
        rule = f'ip daddr {GROUP} udp dport {PORT} {rewrite} udp dport set {OUTPUT_PORT} fwd to "right"'
        with nft_at_ingress(arena, rule):
            arena.wait_until_relayed(1, 1, None)
            yield Running()


class Socat(Peer):
    """One stream, one process, one datagram at a time."""

    name = "socat"
    program = "socat"
    package = "socat"

    @contextlib.contextmanager
    def running(self, arena: Arena, setup: Setup) -> Iterator[Running]:
        source = f"UDP4-RECV:{PORT},bind={GROUP},ip-add-membership={GROUP}:{INPUT_ADDRESS},rcvbuf=16777216"
        target = f"UDP4-DATAGRAM:{OUTPUT_GROUP}:{OUTPUT_PORT},ip-multicast-if={OUTPUT_ADDRESS},ip-multicast-ttl=1"
        with process(arena, ["socat", "-u", "-b", "65536", source, target]) as started:
            arena.wait_until_relayed(1, 1, started)
            yield Running([started.pid], [started.pid])


class OneByOne(Peer):
    """Receive one, send one, over io_uring: the plain way, compiled like the relay; see one_by_one.py."""

    name = "one-by-one"

    @contextlib.contextmanager
    def running(self, arena: Arena, setup: Setup) -> Iterator[Running]:
        command = [sys.executable, "-m", "tools.bench.relay.one_by_one"]
        with process(arena, command) as started:
            arena.wait_until_relayed(1, 1, started)
            yield Running([started.pid], [started.pid])


MCR = Mcr()
MCR_EXCLUSIVE = McrExclusive()
PEERS: dict[str, Peer] = {peer.name: peer for peer in (Smcroute(), NftForward(), Socat(), OneByOne())}
