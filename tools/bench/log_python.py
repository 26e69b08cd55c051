"""What a log call costs from Python, beside other libraries: each writes a file, MCR's by way of a ring and a drain.

loguru, structlog and picologging take part where they are installed: `pip install .[bench]`.
"""

import contextlib
import importlib
import logging
import logging.handlers
import os
import queue
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from logging_shm import Drain, Logger, SharedSPSCRingBuffer
from logging_shm.sinks.file import FileSink
from tools.bench.log_compiled import TEXT

PYTHON_RECORDS = 20_000
PYTHON_BLOCK = 100  # calls that are timed together


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
