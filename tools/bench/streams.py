"""What looking into streams costs a worker: the same full rings for relays that differ in --stream-health alone.

    python -m tools.bench.streams [--rounds 20] [rtp mpeg-ts "rtp mpeg-ts" udp]        as root

A worker is stopped, FRAMES datagrams of 1316 bytes are sent to its ring in frames of their own, and it goes on: its
CPU time (CLOCK_PROCESS_CPUTIME_ID) is what they cost. The relays take turns, each round in the other order,
so that what else the machine does meets them all; told are medians, and the median of the ratios within rounds.
"""

import argparse
import contextlib
import socket
import statistics
import struct
import tempfile
from pathlib import Path

from relay.health import PAYLOADS
from tests.system.harness import Relay, wait_until
from tools.bench.relay.cpu import total_ns
from tools.bench.relay.topology import segment, stopped
from tools.netns import Line

FRAMES = 3000  # sent in some 30 ms: a worker that is stopped for longer is replaced
RING_MIB = "16"
PAYLOAD_BYTES = 1316
WAYS = ("off", "rtp", "full")


def datagrams(payload: str, first: int) -> list[bytes]:
    """FRAMES datagrams, numbered from `first`."""
    made = []
    for number in range(first, first + FRAMES):
        header = struct.pack(">BBHII", 0x80, 33, number & 0xFFFF, number * 900 & 0xFFFFFFFF, 7)
        counters = (7 * number + i for i in range(7))
        cells = b"".join(bytes((0x47, 1, 0, 0x10 | counter & 15)) + bytes(184) for counter in counters)
        content = {"udp": bytes(PAYLOAD_BYTES), "rtp": header, "mpeg-ts": cells, "rtp mpeg-ts": header + cells}[payload]
        made.append(content.ljust(PAYLOAD_BYTES, b"\1"))
    return made


class Contender:
    """A relay between hosts of its own."""

    def __init__(self, way: str, folder: Path, stack: contextlib.ExitStack) -> None:
        self.way = way
        gen, host, _ = stack.enter_context(Line("gen", "relay", "sink")).hosts
        segment(gen, "right", whole=False)
        self.relay = Relay(host, folder, ("left",), 1, "--ring-mib", RING_MIB, "--stream-health", way)
        stack.callback(self.end)
        self.relay.add("bench", "239.1.1.1:5001", "239.2.2.2:6001:right")
        with gen.inside():
            self.socket = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        self.socket.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("10.1.0.1"))
        self.socket.connect(("239.1.1.1", 5001))
        self.sent = 0
        self.frame_ns: list[float] = []

    def end(self) -> None:
        """End the relay, without the log that tests want."""
        with contextlib.redirect_stdout(None):
            self.relay.kill()

    def round(self, payload: str) -> None:
        """One full ring."""
        made = datagrams(payload, self.sent)
        worker = self.relay.ask("list-workers")[0]
        before_ns = total_ns([worker["pid"]])
        with stopped([worker["pid"]]):
            for datagram in made:
                self.socket.send(datagram)
        wanted = worker["packets_relayed"] + len(made)
        wait_until(lambda: self.relay.ask("list-workers")[0]["packets_relayed"] >= wanted, "all relayed")
        self.sent += len(made)
        self.frame_ns.append((total_ns([worker["pid"]]) - before_ns) / len(made))


def measure(payload: str, rounds: int) -> None:
    """Print a line for each way."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mcr-bench-")))
        contenders = [Contender(way, folder, stack) for way in WAYS]
        for number in range(rounds + 1):
            for contender in contenders if number % 2 else reversed(contenders):
                contender.round(payload)
        base = contenders[0].frame_ns[1:]  # the first round warms up
        for contender in contenders:
            ratios = [ns / base_ns for ns, base_ns in zip(contender.frame_ns[1:], base, strict=True)]
            median_ns = statistics.median(contender.frame_ns[1:])
            more = statistics.median(ratios) - 1
            print(f"{payload:12} {contender.way:5} {median_ns:6.0f} ns a datagram  {more:+6.1%}", flush=True)


def main() -> None:
    """As the module says."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.streams")
    parser.add_argument("payloads", nargs="*", choices=[*PAYLOADS, []], default=list(PAYLOADS))
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    for payload in options.payloads:
        measure(payload, options.rounds)


if __name__ == "__main__":
    main()
