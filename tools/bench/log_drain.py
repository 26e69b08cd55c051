"""How many records a second the drain hands to each kind of sink, with somebody at its other end."""

import contextlib
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from numba import njit
from rich.console import Console
from rich.table import Table

from logging_shm import Drain, SharedSPSCRingBuffer
from logging_shm.compiled import write_event
from logging_shm.sinks.base import Sink
from logging_shm.sinks.file import FileSink
from logging_shm.sinks.journald import JournaldSink
from logging_shm.sinks.stream import StreamSink
from logging_shm.sinks.syslog import SyslogSink, SyslogTcpSink
from tools.bench.log_compiled import EVENT, FORMATS, INFO

DRAIN_CAPACITY = 1 << 18


@contextlib.contextmanager
def receiver(family: int, kind: int, address: Any) -> Iterator[Any]:
    """A process that takes and forgets what it is sent; yields its address."""
    with socket.socket(family, kind) as sock:
        sock.bind(address)
        if kind == socket.SOCK_STREAM:
            sock.listen()
        process = multiprocessing.get_context("fork").Process(target=forget, args=(sock,), daemon=True)
        process.start()
        try:
            yield sock.getsockname()
        finally:
            process.terminate()
            process.join()


def forget(sock: socket.socket) -> None:
    """Receive without end."""
    buffer = bytearray(1 << 16)
    while True:
        if sock.type == socket.SOCK_DGRAM:
            sock.recv_into(buffer)
        else:
            peer, _ = sock.accept()
            while peer.recv_into(buffer):
                pass


@contextlib.contextmanager
def sinks(folder: Path) -> Iterator[dict[str, Callable[[], Sink]]]:
    """Every kind of sink, with somebody at the other end."""
    with (
        receiver(socket.AF_UNIX, socket.SOCK_DGRAM, str(folder / "datagrams")) as datagrams,
        receiver(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)) as tcp,
        receiver(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)) as udp,
        Path(os.devnull).open("w") as null,
    ):
        yield {
            "file": lambda: FileSink(folder / "text"),
            "file, JSON": lambda: FileSink(folder / "json", "json"),
            "stream to /dev/null": lambda: StreamSink(null.fileno()),
            "syslog TCP": lambda: SyslogTcpSink(tcp),
            "syslog UDP": lambda: SyslogSink(udp),
            "syslog unix": lambda: SyslogSink(datagrams),
            "journald": lambda: JournaldSink(datagrams),
        }


@njit(cache=True, nogil=True)
def write_many(segment: Any, count: int) -> None:
    """Fill a ring with typed records."""
    for number in range(count):
        write_event(segment, INFO, EVENT, 0, (number, 1316, 0x0A000007, 5001))


def drain_rate(ring: SharedSPSCRingBuffer, make: Callable[[], Sink]) -> tuple[float, float]:
    """Records a second of one core, and by the wall clock, from a full ring to the last byte at the target."""
    write_many(ring.segment.bytes, ring.capacity)
    sink = make()
    drain = Drain([sink])
    begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
    drain.add([ring])
    drain.start()
    while sink.written + sink.lost < ring.capacity:
        time.sleep(0.001)
    wall_s, cpu_s = time.perf_counter() - begin_s, time.process_time() - begin_cpu_s
    drain.stop()
    assert sink.lost == 0, f"{sink.name} lost {sink.lost}"
    return ring.capacity / cpu_s, ring.capacity / wall_s


def bench_drain(rounds: int, console: Console) -> Table:
    """Drain a full ring into each sink."""
    with (
        tempfile.TemporaryDirectory() as folder,
        SharedSPSCRingBuffer.create(f"mcr_bench{os.getpid()}", DRAIN_CAPACITY, formats=FORMATS) as ring,
        sinks(Path(folder)) as makers,
    ):
        results: dict[str, list[tuple[float, float]]] = {name: [] for name in makers}
        for round_number in range(rounds + 1):
            for name, make in makers.items():
                outcome = drain_rate(ring, make)
                for file in ("text", "json"):
                    (Path(folder) / file).unlink(missing_ok=True)
                if round_number:
                    results[name].append(outcome)
    table = Table(
        title=f"drain: {DRAIN_CAPACITY:,} records of one ring, medians of {rounds} rounds; CPU time of drain and sink"
    )
    for column in ("sink", "M records per CPU second", "M records/s"):
        table.add_column(column, justify="left" if column == "sink" else "right")
    for name, rows in results.items():
        table.add_row(name, *(f"{statistics.median(values) / 1e6:.2f}" for values in zip(*rows, strict=True)))
    return table
