"""What a log record costs, from compiled code and from Python, beside other libraries, and how fast the drain is.

    python -m tools.bench.logging            everything

All writers run in turn, the whole round several times. Percentiles are of single records, less what the clock costs
by itself (its steps are of 10 ns on some machines); "in a row" is the mean of a block. The ring is emptied between blocks,
outside of what is timed. loguru, structlog and picologging take part where they are installed.
"""

import contextlib
import importlib
import logging
import logging.handlers
import multiprocessing
import os
import queue
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import numpy as np
from numba import njit
from rich.console import Console
from rich.table import Table

from logging_shm import Drain, Logger, Severity, SharedSPSCRingBuffer
from logging_shm.atomics import int64, load_i64, store_i64
from logging_shm.compiled import clock_gettime, write_event, write_text
from logging_shm.layout import HEADER
from logging_shm.sinks.base import Sink
from logging_shm.sinks.file import FileSink
from logging_shm.sinks.journald import JournaldSink
from logging_shm.sinks.stream import StreamSink
from logging_shm.sinks.syslog import SyslogSink, SyslogTcpSink

CAPACITY = 4096
BLOCK = 2048  # records between two emptyings
RECORDS = 200_000
BLOCKS = 50
PYTHON_RECORDS = 20_000
PYTHON_BLOCK = 100  # calls that are timed together
DRAIN_CAPACITY = 1 << 18
EVENT = 1
TEXT = "First packet of rule tv from 10.0.0.7:5001"
FORMATS = {EVENT: "Received {0:d} datagrams, {1:d} bytes from {2:ip}:{3:port}"}
DEBUG, INFO = int(Severity.Debug), int(Severity.Info)
WRITE_CURSOR, READ_CURSOR = HEADER["write_cursor"], HEADER["read_cursor"]
READ_CURSOR_SEEN = HEADER["read_cursor_seen"]


@njit(cache=True, nogil=True)
def now_ns(scratch: Any) -> int:
    """CLOCK_MONOTONIC."""
    address = scratch.ctypes.data
    clock_gettime(1, address)
    return int64(load_i64(address)) * 1_000_000_000 + int64(load_i64(address + 8))


@njit(cache=True, nogil=True)
def write_own_clock(segment: Any, number: int, text: Any) -> None:
    """Four typed arguments, and the time now."""
    write_event(segment, INFO, EVENT, 0, (number, 1316, 0x0A000007, 5001))


@njit(cache=True, nogil=True)
def write_given_clock(segment: Any, number: int, text: Any) -> None:
    """Four typed arguments, and a time that is known already."""
    write_event(segment, INFO, EVENT, number + 1, (number, 1316, 0x0A000007, 5001))


@njit(cache=True, nogil=True)
def write_a_text(segment: Any, number: int, text: Any) -> None:
    """Text, and the time now."""
    write_text(segment, INFO, 0, text, len(text))


@njit(cache=True, nogil=True)
def write_filtered(segment: Any, number: int, text: Any) -> None:
    """A record whose level is off."""
    write_event(segment, DEBUG, EVENT, 0, (number, 1316, 0x0A000007, 5001))


@njit(cache=True, nogil=True)
def write_nothing(segment: Any, number: int, text: Any) -> None:
    """What the loop around the others costs."""


@njit(nogil=True)
def time_records(write: Any, segment: Any, empty: bool, text: Any, took: Any, scratch: Any) -> None:
    """Write len(took) records, each timed by itself; with `empty`, the ring is emptied after each BLOCK."""
    base = segment.ctypes.data
    for number in range(len(took)):
        if number % BLOCK == 0 and empty:
            store_i64(base + READ_CURSOR, load_i64(base + WRITE_CURSOR))
            store_i64(base + READ_CURSOR_SEEN, load_i64(base + WRITE_CURSOR))
        begin = now_ns(scratch)
        write(segment, number, text)
        took[number] = now_ns(scratch) - begin


@njit(nogil=True)
def time_block(write: Any, segment: Any, empty: bool, text: Any, scratch: Any) -> float:
    """The mean of BLOCK records in a row: without the clock, and with the records overlapping in the processor."""
    base = segment.ctypes.data
    if empty:
        store_i64(base + READ_CURSOR, load_i64(base + WRITE_CURSOR))
        store_i64(base + READ_CURSOR_SEEN, load_i64(base + WRITE_CURSOR))
    begin = now_ns(scratch)
    for number in range(BLOCK):
        write(segment, number, text)
    return (now_ns(scratch) - begin) / BLOCK


KINDS = {
    "typed, own timestamp": write_own_clock,
    "typed, the packet's timestamp": write_given_clock,
    "text of 43 bytes, own timestamp": write_a_text,
    "filtered out": write_filtered,
    "ring full": write_given_clock,
}
FULL = "ring full"


def fill(ring: SharedSPSCRingBuffer) -> None:
    """Write until the ring is full."""
    while ring.append(INFO, TEXT):
        pass


def bench_compiled(rounds: int) -> Table:
    """Time each kind of record from compiled code."""
    text = np.frombuffer(TEXT.encode(), np.uint8)
    scratch = np.zeros(2, np.int64)
    took = np.zeros(RECORDS, np.int64)
    results: dict[str, list[tuple[float, ...]]] = {name: [] for name in KINDS}
    with SharedSPSCRingBuffer.create(f"mcr_bench{os.getpid()}", CAPACITY, formats=FORMATS) as ring:
        ring.segment.level = Severity.Info
        segment = ring.segment.bytes
        for round_number in range(rounds + 1):
            time_records(write_nothing, segment, False, text, took, scratch)
            clock_ns = float(np.median(took))
            for name, write in KINDS.items():
                if name == FULL:
                    fill(ring)
                time_records(write, segment, name != FULL, text, took, scratch)
                single = np.percentile(took, [50, 99, 99.9]) - clock_ns
                blocks = [time_block(write, segment, name != FULL, text, scratch) for _ in range(BLOCKS)]
                if round_number:  # the first warms up
                    results[name].append((statistics.median(blocks), *single.tolist()))
    table = Table(
        title=f"compiled: ns a record, medians of {rounds} rounds of {RECORDS:,}; the clock costs {clock_ns:.0f} ns"
    )
    for column in ("record", "in a row", "p50", "p99", "p99.9"):
        table.add_column(column, justify="left" if column == "record" else "right")
    for name, rows in results.items():
        table.add_row(name, *(f"{statistics.median(values):.1f}" for values in zip(*rows, strict=True)))
    return table


# --- from Python ------------------------------------------------------------------------------------


@contextlib.contextmanager
def ring_writer() -> Iterator[Callable[[str], object]]:
    """logging_shm, beside a drain that writes a file."""
    with tempfile.TemporaryDirectory() as folder:
        ring = SharedSPSCRingBuffer.create(f"mcr_bench{os.getpid()}", 1 << 15)
        drain = Drain([FileSink(Path(folder) / "log")])
        drain.add([ring])
        drain.start()
        try:
            yield Logger(ring).info
        finally:
            drain.stop()
            ring.shutdown()


@contextlib.contextmanager
def stdlib_logger(handler: logging.Handler) -> Iterator[Callable[[str], object]]:
    """The standard library's logging, with one handler."""
    logger = logging.Logger("bench")
    handler.setFormatter(logging.Formatter("%(asctime)s [%(levelname)s] %(message)s"))
    logger.addHandler(handler)
    try:
        yield logger.info
    finally:
        handler.close()


@contextlib.contextmanager
def stdlib_file() -> Iterator[Callable[[str], object]]:
    """FileHandler."""
    with tempfile.TemporaryDirectory() as folder, stdlib_logger(logging.FileHandler(Path(folder) / "log")) as write:
        yield write


@contextlib.contextmanager
def stdlib_queue() -> Iterator[Callable[[str], object]]:
    """QueueHandler, a thread writing the file."""
    with tempfile.TemporaryDirectory() as folder:
        waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
        listener = logging.handlers.QueueListener(waiting, logging.FileHandler(Path(folder) / "log"))
        listener.start()
        with stdlib_logger(logging.handlers.QueueHandler(waiting)) as write:
            yield write
        listener.stop()


@contextlib.contextmanager
def loguru_file() -> Iterator[Callable[[str], object]]:
    """loguru into a file."""
    logger = importlib.import_module("loguru").logger
    with tempfile.TemporaryDirectory() as folder:
        logger.remove()
        number = logger.add(Path(folder) / "log")
        yield logger.info
        logger.remove(number)


@contextlib.contextmanager
def structlog_file() -> Iterator[Callable[[str], object]]:
    """structlog's fastest documented set-up: bytes into a file."""
    structlog = importlib.import_module("structlog")
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("wb") as file:
        logger = structlog.wrap_logger(
            structlog.BytesLogger(file),
            processors=[
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso"),
                structlog.processors.JSONRenderer(serializer=lambda fields, **_: str(fields).encode()),
            ],
            wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
            cache_logger_on_first_use=True,
        )
        yield logger.bind().info


@contextlib.contextmanager
def picologging_file() -> Iterator[Callable[[str], object]]:
    """picologging's FileHandler."""
    picologging = importlib.import_module("picologging")
    with tempfile.TemporaryDirectory() as folder:
        handler = picologging.FileHandler(str(Path(folder) / "log"))
        handler.setFormatter(picologging.Formatter("%(asctime)s [%(levelname)s] %(message)s"))
        logger = picologging.Logger("bench", picologging.INFO)
        logger.addHandler(handler)
        yield logger.info
        handler.close()


WRITERS: dict[str, tuple[Callable[[], Any], str | None]] = {
    "logging_shm Logger": (ring_writer, None),
    "logging FileHandler": (stdlib_file, None),
    "logging QueueHandler": (stdlib_queue, None),
    "loguru": (loguru_file, "loguru"),
    "structlog": (structlog_file, "structlog"),
    "picologging FileHandler": (picologging_file, "picologging"),
}


def time_calls(write: Callable[[str], object]) -> float:
    """Microseconds of a call: the median over blocks, as the other threads of a library share the core."""
    took = []
    for _ in range(PYTHON_RECORDS // PYTHON_BLOCK):
        begin_ns = time.perf_counter_ns()
        for _ in range(PYTHON_BLOCK):
            write(TEXT)
        took.append((time.perf_counter_ns() - begin_ns) / PYTHON_BLOCK / 1000)
    return statistics.median(took)


def bench_python(rounds: int, console: Console) -> Table:
    """Time a call of each library."""
    present = {}
    for name, (writer, module) in WRITERS.items():
        if module and find_spec(module) is None:
            console.print(f"{module} is not installed: pip install {module}")
        else:
            present[name] = writer
    results: dict[str, list[float]] = {name: [] for name in present}
    for _ in range(rounds):
        for name, writer in present.items():
            with writer() as write:
                results[name].append(time_calls(write))
    base = statistics.median(results["logging FileHandler"])
    table = Table(title=f"from Python: a call, medians of {rounds} rounds of {PYTHON_RECORDS:,}")
    for column in ("writer", "µs", "times faster than FileHandler"):
        table.add_column(column, justify="left" if column == "writer" else "right")
    for name, values in results.items():
        median = statistics.median(values)
        table.add_row(name, f"{median:.2f}", f"{base / median:.1f}")
    return table


# --- the drain --------------------------------------------------------------------------------------


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


def bench_drain(rounds: int) -> Table:
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


@click.command()
@click.option("--rounds", default=5, show_default=True, help="Repetitions.")
def main(rounds: int) -> None:
    """Measure writing and draining."""
    console = Console(width=120)
    console.print(bench_compiled(rounds))
    console.print(bench_python(rounds, console))
    console.print(bench_drain(rounds))


if __name__ == "__main__":
    main()
