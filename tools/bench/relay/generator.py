"""The generator process: lives in the first host, pinned to a core of its own, takes orders as lines of JSON.

    {"rate": 100000, "seconds": 3, "size": 1316, "streams": 1, "segments": 0}       → {"datagrams": …, "seconds": …}

It stays for the whole benchmark, so that no run waits for imports. Generator is its handle in the benchmark.
"""

import ctypes
import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np

from relay.dataplane.layout import SOCKADDR_IN
from tools.addressing import spread
from tools.bench.relay.load import make_load, segments_of, send_paced
from tools.bench.relay.probe import Probe, histogram_summary, run_probe, warm_up
from tools.environment import CHECKOUT
from tools.netns import Host

GROUP = "239.1.0.1"
PORT = 5001
SOURCE = "10.1.0.1"
TTL = 8  # what routes needs more than 1
TICK_NS = 50_000
SEND_BUFFER_BYTES = 64 << 20
SO_SNDBUFFORCE = 32
PR_SET_TIMERSLACK = 29  # linux/prctl.h; the default of 50 us would double a tick


@dataclass(frozen=True)
class LoadOrder:
    """Send `rate` datagrams a second, 0 for flat out."""

    rate: float
    seconds: float
    size: int
    streams: int = 1
    segments: int = 0  # datagrams in a message that the kernel cuts, 0 for as many as it takes, 1 for single sends
    count: int = 1 << 62  # no more than these, whatever time remains


@dataclass(frozen=True)
class ProbeOrder:
    """Send one datagram at a time, evenly, and receive it behind the relay."""

    rate: float
    seconds: float
    size: int
    namespace: str  # of the receiver
    group: str
    port: int


@dataclass(frozen=True)
class Sent:
    """What came of a LoadOrder."""

    datagrams: int
    seconds: float
    errors: int
    last_errno: int

    @property
    def pps(self) -> float:
        """Datagrams a second, as achieved."""
        return self.datagrams / self.seconds


def addresses(streams: int) -> Any:
    """Destinations of the streams, SOCKADDR_IN[streams]."""
    names = np.zeros(streams, SOCKADDR_IN)
    names["sin_family"] = socket.AF_INET
    for name, (group, port) in zip(names, spread(GROUP, PORT, streams, "group"), strict=True):
        name["sin_port"] = socket.htons(port)
        name["sin_addr"] = np.frombuffer(socket.inet_aton(group), np.uint32)[0]
    return names


def open_sender() -> socket.socket:
    """The socket that everything leaves by."""
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sender.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, SEND_BUFFER_BYTES)
    sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(SOURCE))
    sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, TTL)
    sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 0)
    sender.bind((SOURCE, 0))
    return sender


def obey_load(sender: socket.socket, order: LoadOrder) -> Sent:
    """Send."""
    load = make_load(addresses(order.streams), order.size)
    segments = order.segments or segments_of(order.size)
    arguments = (order.size, segments, float(order.rate), TICK_NS, int(order.seconds * 1e9), order.count)
    elapsed_ns = send_paced(load, sender.fileno(), *arguments)
    state = load.state[0]
    return Sent(int(state["datagrams"]), elapsed_ns / 1e9, int(state["errors"]), int(state["last_errno"]))


def load_compiled_code(sender: socket.socket) -> None:
    """Compile or load what orders use, so that no measurement waits for it."""
    obey_load(sender, LoadOrder(1.0, 0.0, 64, 1, 1, 0))
    warm_up()


def serve(core: int) -> None:
    """Obey until the input ends."""
    os.sched_setaffinity(0, {core})
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1)
    with open_sender() as sender:
        load_compiled_code(sender)
        print("ready", flush=True)
        for line in sys.stdin:
            order = json.loads(line)
            if "namespace" in order:
                answer = histogram_summary(run_probe(sender, Probe(**order), (GROUP, PORT)))
            else:
                answer = asdict(obey_load(sender, LoadOrder(**order)))
            print(json.dumps(answer), flush=True)


class Generator:
    """A generator process in a host; a context manager."""

    def __init__(self, host: Host, core: int) -> None:
        command = [sys.executable, "-m", "tools.bench.relay.generator", str(core)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        # A session of its own: Ctrl-C reaches the benchmark only, which then ends this process.
        self.process = host.popen(command, cwd=CHECKOUT, start_new_session=True, **pipes)
        self._answer()

    @property
    def pid(self) -> int:
        """The process, for its CPU time."""
        return self.process.pid

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the generator ended with status {self.process.wait()}")
        return line

    def begin(self, order: LoadOrder | ProbeOrder) -> None:
        """Give an order; it is obeyed while the caller does something else."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asdict(order)) + "\n")
        self.process.stdin.flush()

    def send(self, order: LoadOrder) -> Sent:
        """Send, to the end. Raises RuntimeError when the kernel refused anything."""
        self.begin(order)
        return self.finish()

    def finish(self) -> Sent:
        """What came of the load that was begun. Raises RuntimeError when the kernel refused anything."""
        sent = Sent(**json.loads(self._answer()))
        if sent.errors:
            raise RuntimeError(f"the generator could not send: {os.strerror(sent.last_errno)}")
        return sent

    def probe(self, order: ProbeOrder) -> Any:
        """Measure latency; see probe.py."""
        self.begin(order)
        return json.loads(self._answer())

    def close(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
