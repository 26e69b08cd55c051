"""The place where contenders meet: gen ─ relay ─ sink, its generator, its sink, and one run between them.

A context manager: namespaces and processes end with it, whatever happened.
"""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tools.bench.relay.cpu import is_alive, ksoftirqd_pids, total_ns
from tools.bench.relay.generator import Generator, LoadOrder, ProbeOrder, Sent
from tools.bench.relay.sink import Sink
from tools.netns import Host, Line

WARM_UP_PPS = 2000
WARM_UP_S = 0.1
READY_S = 30.0
JUMBO_MTU = 9000
ETHERNET_MTU = 1500
IP_UDP_HEADER_BYTES = 28
RPS_FILE = "/sys/class/net/left/queues/rx-0/rps_cpus"  # Documentation/networking/scaling.rst


def mtu_for(size: int) -> int:
    """The MTU that lets payloads of `size` through whole."""
    return ETHERNET_MTU if size + IP_UDP_HEADER_BYTES <= ETHERNET_MTU else JUMBO_MTU


class EndedError(RuntimeError):
    """What was measured ended meanwhile: its figures mean nothing."""


@dataclass(frozen=True)
class Run:
    """What came of one load."""

    sent: int
    seconds: float
    arrived: int  # at the sink, copies included
    copies: int  # of each datagram, when none is lost
    worker_ns: tuple[int, ...]  # CPU time of each process that moves packets
    relay_ns: int  # of all processes of the contender
    other_ns: int  # of generator and ksoftirqd

    @property
    def achieved_pps(self) -> float:
        """What the generator managed."""
        return self.sent / self.seconds

    @property
    def lost(self) -> int:
        """Copies that did not arrive."""
        return self.sent * self.copies - self.arrived

    @property
    def loss(self) -> float:
        """The part that was lost, 0 to 1."""
        return self.lost / (self.sent * self.copies) if self.sent else 0.0

    @property
    def out_per_cpu_s(self) -> float:
        """Datagrams that left for each second of the workers' CPU time."""
        return self.arrived * 1e9 / max(sum(self.worker_ns), 1)

    @property
    def saturated(self) -> bool:
        """Whether a worker had no time left."""
        return max(self.worker_ns, default=0) > 0.95 * self.seconds * 1e9


def segment(host: Host, interface: str, whole: bool) -> None:
    """Whether super-frames leave an interface whole, or cut to datagrams."""
    command = ["ethtool", "-K", interface, "tx-udp-segmentation", "on" if whole else "off"]
    result = host.run(command, capture_output=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}: {result.stderr.strip()}")


def check_alive(pids: Sequence[int]) -> None:
    """Raises EndedError when one of the processes is gone."""
    if not all(map(is_alive, pids)):
        raise EndedError("ended while it was measured")


@contextlib.contextmanager
def stopped(pids: Sequence[int]) -> Iterator[None]:
    """In the block, processes stand still."""
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


class Cores:
    """Who runs where: generator on the last core that may be used, contenders from the first on."""

    def __init__(self) -> None:
        allowed = sorted(os.sched_getaffinity(0))
        self.relay = allowed[0]
        self.generator = allowed[-1]
        self.allowed = allowed


class Arena:
    """Hosts, generator and sink for frames of one MTU."""

    def __init__(self, mtu: int, cut_egress: bool = False) -> None:
        """`cut_egress`: what leaves the relay is cut to wire size, as for a NIC without segmentation offload."""
        self.cores = Cores()
        self.mtu = mtu
        self._superframes = True
        with contextlib.ExitStack() as stack:
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mcr-bench-")))
            self.line = stack.enter_context(Line("gen", "relay", "sink", mtu=mtu))
            self.sink = Sink(self.line.hosts[2])
            self.generator = stack.enter_context(Generator(self.line.hosts[0], self.cores.generator))
            self._kernel_pids = ksoftirqd_pids()
            if cut_egress:
                segment(self.relay_host, "right", False)
            self._stack = stack.pop_all()

    @property
    def relay_host(self) -> Host:
        """Where contenders run: `left` is their input, `right` their output."""
        return self.line.hosts[1]

    def superframes(self, whole: bool) -> None:
        """Whether the generator's messages cross the first cable whole, or cut to wire size before."""
        if whole != self._superframes:
            segment(self.line.hosts[0], "right", whole)
            self._superframes = whole

    def interrupt_relays_core(self, wanted: bool) -> None:
        """Whether a core of the relay takes its packets in (receive packet steering), or the sender's does."""
        mask = f"{1 << self.cores.relay if wanted else 0:x}"
        grouped = ",".join(reversed([mask[max(end - 8, 0) : end] for end in range(len(mask), 0, -8)]))
        result = self.relay_host.run(["tee", RPS_FILE], input=grouped, capture_output=True)
        if result.returncode:
            raise RuntimeError(f"{RPS_FILE}: {result.stderr.strip()}")

    def run(
        self,
        order: LoadOrder,
        whole: bool = False,
        pids: Sequence[int] = (),
        workers: Sequence[int] = (),
        copies: int = 1,
    ) -> Run:
        """Send, and account for packets and CPU time. `workers` are those of `pids` that move packets."""
        self.superframes(whole)
        others = [self.generator.pid, *self._kernel_pids]
        counted = self.sink.settled()
        before = [total_ns([pid]) for pid in workers], total_ns(pids), total_ns(others)
        sent: Sent = self.generator.send(order)
        after = [total_ns([pid]) for pid in workers], total_ns(pids), total_ns(others)
        arrived = self.sink.settled().datagrams(counted, order.size)
        check_alive(pids)
        worker_ns = tuple(later - earlier for later, earlier in zip(after[0], before[0], strict=True))
        return Run(sent.datagrams, sent.seconds, arrived, copies, worker_ns, after[1] - before[1], after[2] - before[2])

    def drain(self, order: LoadOrder, workers: Sequence[int], rounds: int) -> tuple[int, tuple[int, ...]]:
        """Fill the rings while the workers are stopped, let them go on, `rounds` times.

        Returns the datagrams that arrived and each worker's CPU time.
        """
        self.superframes(False)
        counted, before = self.sink.settled(), [total_ns([worker]) for worker in workers]
        for _ in range(rounds):
            with stopped(workers):
                self.generator.send(order)
            self.sink.settled()
        used_ns = tuple(total_ns([worker]) - early for worker, early in zip(workers, before, strict=True))
        return self.sink.settled().datagrams(counted, order.size), used_ns

    def wait_until_relayed(self, streams: int, copies: int, process: "subprocess.Popen[str] | None") -> None:
        """Send a little until all of it arrives. Raises RuntimeError when it never does."""
        end_s = time.monotonic() + READY_S
        while time.monotonic() < end_s:
            if process is not None and process.poll() is not None:
                break
            run = self.run(LoadOrder(WARM_UP_PPS, WARM_UP_S, 64, streams, 1), copies=copies)
            if run.arrived and run.lost == 0:
                return
        raise RuntimeError("what was started relays nothing")

    def probe(self, rate: float, seconds: float, size: int, output: tuple[str, int], pids: Sequence[int]) -> Any:
        """Latency percentiles in microseconds, see probe.py, and the part of a core that `pids` used meanwhile."""
        self.superframes(False)
        with self.delivering() as sink:
            before_s, before_ns = time.monotonic(), total_ns(pids)
            found = self.generator.probe(ProbeOrder(rate, seconds, size, sink.namespace, *output))
            used_ns = total_ns(pids) - before_ns
            check_alive(pids)
            return {**found, "core_share": used_ns / 1e9 / (time.monotonic() - before_s)}

    @contextlib.contextmanager
    def delivering(self) -> Iterator[Host]:
        """In the block, datagrams reach sockets of the sink."""
        self.sink.deliver()
        try:
            yield self.line.hosts[2]
        finally:
            self.sink.count()

    def close(self) -> None:
        """End everything."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
