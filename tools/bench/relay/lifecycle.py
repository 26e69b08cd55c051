"""Parts about processes, not packets: memory, start, the death of a worker, and how fast the relay answers."""

import contextlib
import itertools
import os
import re
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.system.harness import BIN, Relay
from tools.bench.relay.bench import USUAL_SIZE, Bench, progress
from tools.bench.relay.generator import LoadOrder
from tools.bench.relay.peers import MCR, OUTPUT_GROUP, OUTPUT_PORT, Setup, configuration
from tools.bench.relay.results import Case
from tools.netns import Host
from tools.receiving import SO_TIMESTAMPNS

SO_RCVBUFFORCE = 33
RECEIVE_BUFFER_BYTES = 64 << 20
START_PPS = 2_000  # one each half millisecond: the resolution
START_S_MAX = 10.0
FAILOVER_PPS = 10_000
FAILOVER_S = 1.5
KILL_AFTER_S = 0.5
SILENCE_S = 0.3
PINGS = 10
TOUCH_PPS = 100_000  # before memory is looked at, so that all of it is in use
TOUCH_S = 0.5
MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \S+ *(.*)$")


def mappings(pid: int) -> Iterator[tuple[str, int]]:
    """Name and PSS in bytes of each mapping of a process. man 5 proc, smaps."""
    name = ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if found := MAPPING.match(line):
            name = found[1]
        elif line.startswith("Pss:"):
            yield name, int(line.split()[1]) * 1024


def pss_bytes(pid: int) -> tuple[int, int]:
    """Proportional memory of a process: packet rings, and everything else."""
    sizes = list(mappings(pid))
    ring_bytes = sum(size for name, size in sizes if name.startswith("socket:"))
    return ring_bytes, sum(size for _, size in sizes) - ring_bytes


def memory(bench: Bench) -> None:
    """PSS of all processes, and of the workers, besides the packet rings."""
    arena = bench.arena()
    for count in bench.plan.workers:
        progress(f"memory of {count} workers")
        with bench.running(MCR, arena, workers=count) as running:
            if running is None:
                continue
            arena.generator.send(LoadOrder(TOUCH_PPS, TOUCH_S, USUAL_SIZE))
            sizes = {pid: pss_bytes(pid) for pid in running.pids}
            others = [rest for pid, (_, rest) in sizes.items() if pid not in running.workers]
            bench.results.add(
                "memory",
                Case(MCR.name, workers=count),
                total_mb=sum(rest for _, rest in sizes.values()) / 1e6,
                supervisor_mb=sizes[running.pids[0]][1] / 1e6,
                other_helpers_mb=(sum(others) - sizes[running.pids[0]][1]) / 1e6,
                each_worker_mb=sum(sizes[pid][1] for pid in running.workers) / count / 1e6,
                rings_mb=sum(ring for ring, _ in sizes.values()) / 1e6,
            )


def listen(sink: Host) -> socket.socket:
    """A socket of the sink's that has joined the output and tells receive times."""
    with sink.inside():
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    sock.bind((OUTPUT_GROUP, OUTPUT_PORT))
    membership = socket.inet_aton(OUTPUT_GROUP) + socket.inet_aton("10.2.0.2")
    sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
    return sock


def receive_time_s(sock: socket.socket) -> float:
    """When the kernel received the next datagram, CLOCK_REALTIME. Raises TimeoutError."""
    _, control, _, _ = sock.recvmsg(64, 64)
    seconds, nanoseconds = struct.unpack("@qq", control[0][2][:16])
    return float(seconds) + nanoseconds / 1e9


def start(bench: Bench) -> None:
    """From exec to the first packet relayed, while traffic is there already and caches are warm."""
    arena = bench.arena()
    progress("start")
    with bench.running(MCR, arena):  # warms page cache and compiled code's cache
        pass
    config = arena.folder / "start.toml"
    config.write_text(configuration(Setup()))
    with arena.delivering() as sink, listen(sink) as sock:
        sock.settimeout(START_S_MAX)
        arena.generator.begin(LoadOrder(START_PPS, START_S_MAX / 2, USUAL_SIZE, 1, 1))
        executed_s = time.time()
        relay = Relay(arena.relay_host, arena.folder, ("left",), 1, "--config", str(config))
        try:
            elapsed_s = receive_time_s(sock) - executed_s
            bench.results.add("start", Case(MCR.name, rules=1, workers=1), first_packet_s=elapsed_s)
        except TimeoutError:
            bench.results.note("start: no packet was relayed")
        finally:
            end(relay)
            arena.generator.finish()


def end(relay: Relay) -> None:
    """Stop a relay and say nothing."""
    with contextlib.redirect_stdout(None):
        relay.kill()


def failover(bench: Bench) -> None:
    """From `kill -9` of a worker to the next packet relayed, and what was lost by it."""
    arena = bench.arena()
    progress("failover")
    with bench.running(MCR, arena) as running:
        if running is None:
            return
        with arena.delivering() as sink, listen(sink) as sock:
            arena.generator.begin(LoadOrder(FAILOVER_PPS, FAILOVER_S, USUAL_SIZE, 1, 1))
            time.sleep(KILL_AFTER_S)
            killed_s = time.time()
            os.kill(running.workers[0], signal.SIGKILL)
            sent = arena.generator.finish()
            times_s = list(receive_times_s(sock))
        gap_s, next_s = max((late - early, late) for early, late in itertools.pairwise(times_s) if late > killed_s)
        bench.results.add(
            "failover",
            Case(MCR.name, rate=FAILOVER_PPS),
            next_packet_s=next_s - killed_s,
            silence_s=gap_s,
            lost=sent.datagrams - len(times_s),
        )


def receive_times_s(sock: socket.socket) -> Iterator[float]:
    """Receive times until there is silence."""
    sock.settimeout(SILENCE_S)
    try:
        while True:
            yield receive_time_s(sock)
    except TimeoutError:
        return


def ping(bench: Bench) -> None:
    """Wall time of `mcrctl ping`, from exec to exit."""
    arena = bench.arena()
    progress("ping")
    with bench.running(MCR, arena) as running:
        if running is None or running.relay is None:
            return
        command = [str(BIN / "mcrctl"), "--socket", str(running.relay.socket), "ping"]
        for _ in range(PINGS):
            started_s = time.monotonic()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            bench.results.add("ping", Case(MCR.name), wall_ms=(time.monotonic() - started_s) * 1000)
