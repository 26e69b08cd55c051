"""Python's `logging` into rings: one a process, through fork, spawn, pickling and reconfiguration; nothing is lost."""

import itertools
import logging
import logging.config
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logging_shm import Drain, Facility, LogEntry, RingHandler, Severity, SharedSPSCRingBuffer
from logging_shm.bridge import LEVELS, NOTICE, severity_of
from logging_shm.sinks.file import FileSink
from logging_shm.sinks.selection import Selection
from tests.logging_shm.sink_harness import until

LOGGER = "bridge-test"
_serial = itertools.count(1)


@pytest.fixture
def name() -> Iterator[str]:
    """A name for rings, all of which are unlinked after the test."""
    name = f"bridge{os.getpid()}.{next(_serial)}"
    yield name
    for segment in segments(name):
        segment.unlink()


def segments(name: str) -> list[Path]:
    return list(Path("/dev/shm").glob(f"mcr_{name}_*"))


@pytest.fixture
def make_handler(name: str) -> Iterator[Callable[..., RingHandler]]:
    """Handlers on the logger of these tests."""
    handlers: list[RingHandler] = []
    logger = logging.getLogger(LOGGER)
    logger.propagate = False
    logger.setLevel(logging.DEBUG)

    def make(*arguments: object, **options: object) -> RingHandler:
        handlers.append(RingHandler(name, *arguments, **options))  # type: ignore[arg-type]
        logger.addHandler(handlers[-1])
        return handlers[-1]

    yield make
    for handler in handlers:
        logger.removeHandler(handler)
        read_all(name)
        handler.close()


def read_all(name: str, pid: int | None = None) -> list[LogEntry]:
    """What is unread in a process's ring."""
    path = Path(f"/dev/shm/mcr_{name}_{pid or os.getpid()}")
    if not path.exists():
        return []
    ring = SharedSPSCRingBuffer.attach(path.name)
    return list(iter(ring.read, None))


def texts(name: str, pid: int | None = None) -> list[str]:
    return [entry.message for entry in read_all(name, pid)]


MakeHandler = Callable[..., RingHandler]


def test_a_record_goes_into_this_processs_ring_with_its_loggers_name(name: str, make_handler: MakeHandler) -> None:
    make_handler()
    logging.getLogger(LOGGER).warning("%d of %s", 3, "four")
    (entry,) = read_all(name)
    assert (entry.message, entry.severity, entry.facility) == ("3 of four", Severity.Warning, Facility.Test)
    assert (entry.process, entry.thread) == (os.getpid(), threading.get_native_id())
    assert entry.pairs == (("logger", LOGGER),)


def test_no_ring_is_made_before_the_first_record(name: str, make_handler: MakeHandler) -> None:
    make_handler()
    assert segments(name) == []


@pytest.mark.parametrize("severity", list(Severity))
def test_severities_and_levels_map_both_ways(severity: Severity) -> None:
    assert severity_of(LEVELS[severity]) is severity
    assert severity_of(LEVELS[severity] + 1) is severity
    assert logging.getLevelName(LEVELS[severity]) == severity.name.upper()


@given(st.integers(), st.integers())
def test_a_higher_level_is_never_less_grave(one: int, other: int) -> None:
    assert (one >= other) <= (severity_of(one) <= severity_of(other))


def test_a_notice_is_a_notice_in_the_ring(name: str, make_handler: MakeHandler) -> None:
    make_handler()
    logging.getLogger(LOGGER).log(NOTICE, "noticed")
    assert [entry.severity for entry in read_all(name)] == [Severity.Notice]


def test_a_traceback_is_one_line_cut_to_its_room_and_marked(name: str, make_handler: MakeHandler) -> None:
    make_handler()
    try:
        raise ValueError("no")
    except ValueError:
        logging.getLogger(LOGGER).exception("it failed")
    (entry,) = read_all(name)
    assert entry.severity is Severity.Error
    assert entry.message.startswith("it failed\\nTraceback (most recent call last):\\n")
    assert entry.message.endswith("…")
    assert "\n" not in entry.message


def test_a_record_that_can_not_be_formatted_is_told_and_the_next_one_written(
    name: str, make_handler: MakeHandler, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = make_handler()
    handler.handle(logging.makeLogRecord({"msg": "%d", "args": ("no number",)}))
    logging.getLogger(LOGGER).info("fine")
    assert texts(name) == ["fine"]
    told = capsys.readouterr().err
    assert "Message: '%d'\nArguments: ('no number',)" in told


def test_a_full_ring_drops_and_counts(name: str, make_handler: MakeHandler) -> None:
    make_handler(capacity=4)
    for number in range(6):
        logging.getLogger(LOGGER).info("%d", number)
    ring = SharedSPSCRingBuffer.attach(f"mcr_{name}_{os.getpid()}")
    assert ring.dropped() == 2
    assert texts(name) == ["0", "1", "2", "3"]


def test_threads_share_a_handler(name: str, make_handler: MakeHandler) -> None:
    make_handler()
    logger = logging.getLogger(LOGGER)

    def log() -> None:
        for _ in range(200):
            logger.info("x")

    threads = [threading.Thread(target=log) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entries = read_all(name)
    assert len(entries) == 800
    assert len({entry.thread for entry in entries}) == 4


def test_handlers_of_one_name_share_a_ring(name: str, make_handler: MakeHandler) -> None:
    first, second = make_handler(level=logging.ERROR), make_handler(level=logging.DEBUG)
    first.setFormatter(logging.Formatter("first %(message)s"))
    second.setFormatter(logging.Formatter("second %(message)s"))
    logging.getLogger(LOGGER).error("x")
    assert texts(name) == ["first x", "second x"]
    first.close()
    assert len(segments(name)) == 1
    logging.getLogger(LOGGER).info("y")
    assert texts(name) == ["second y"]
    logging.getLogger(LOGGER).removeHandler(first)
    second.close()
    assert segments(name) == []


def test_a_closed_handler_leaves_unread_records_and_no_empty_ring(name: str, make_handler: MakeHandler) -> None:
    handler = make_handler()
    logging.getLogger(LOGGER).info("unread")
    handler.close()
    assert texts(name) == ["unread"]
    logging.getLogger(LOGGER).info("after closing")
    assert texts(name) == ["after closing"]
    handler.close()
    handler.close()
    assert segments(name) == []


def configure(name: str, level: str = "DEBUG") -> None:
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"short": {"format": "%(levelname)s %(message)s"}},
            "handlers": {
                "ring": {
                    "class": "logging_shm.RingHandler", "name": name, "capacity": 64, "level": level,
                    "formatter": "short",
                },
            },
            "loggers": {LOGGER: {"handlers": ["ring"], "level": "DEBUG", "propagate": False}},
        }
    )  # fmt: skip


def test_a_dictionary_configures_it_also_a_second_time_with_records_unread(name: str) -> None:
    configure(name)
    logging.getLogger(LOGGER).info("one")
    configure(name, "WARNING")
    logging.getLogger(LOGGER).info("not wanted")
    logging.getLogger(LOGGER).warning("two")
    logging.config.dictConfig({"version": 1, "disable_existing_loggers": False, "loggers": {LOGGER: {"handlers": []}}})
    assert texts(name) == ["INFO one", "WARNING two"]


@pytest.mark.parametrize("bad", ["", "with space", "a/b", "é", "x" * 200])
def test_a_name_that_no_ring_can_have_is_refused_at_once(bad: str) -> None:
    with pytest.raises(ValueError, match="expected up to 190 letters, digits"):
        RingHandler(bad)


@pytest.mark.parametrize("capacity", [0, -1, 3])
def test_a_capacity_that_no_ring_can_have_is_refused_at_once(capacity: int) -> None:
    with pytest.raises(ValueError, match="expected a power of two"):
        RingHandler("x", capacity)


def test_a_ring_that_can_not_be_made_is_told_and_tried_again_with_the_next_record(
    name: str, make_handler: MakeHandler, capsys: pytest.CaptureFixture[str]
) -> None:
    make_handler()
    obstacle = Path(f"/dev/shm/mcr_{name}_{os.getpid()}")
    obstacle.write_text("in the way")
    logging.getLogger(LOGGER).info("lost")
    assert "exists and is no log segment" in capsys.readouterr().err
    obstacle.unlink()
    logging.getLogger(LOGGER).info("written")
    assert texts(name) == ["written"]


def test_a_pickled_handler_keeps_its_level_format_filters_and_name(name: str, make_handler: MakeHandler) -> None:
    handler = make_handler(64, logging.INFO)
    handler.setFormatter(logging.Formatter("<%(message)s>"))
    handler.addFilter(logging.Filter(LOGGER))
    handler.set_name("mine")
    logging.getLogger(LOGGER).info("one")
    logging.getLogger(LOGGER).removeHandler(handler)
    other: RingHandler = pickle.loads(pickle.dumps(handler))
    assert (other.level, other.get_name()) == (logging.INFO, "mine")
    logger = logging.getLogger("elsewhere")
    logger.addHandler(other)
    logger.error("filtered out")
    logger.removeHandler(other)
    logging.getLogger(LOGGER).addHandler(other)
    logging.getLogger(LOGGER).info("two")
    logging.getLogger(LOGGER).removeHandler(other)
    assert texts(name) == ["<one>", "<two>"]
    other.close()


def test_a_forked_child_writes_a_ring_of_its_own(name: str, make_handler: MakeHandler) -> None:
    make_handler()
    logging.getLogger(LOGGER).info("of the parent")
    pid = os.fork()
    if pid == 0:
        logging.getLogger(LOGGER).info("of the child")
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    logging.getLogger(LOGGER).info("of the parent again")
    assert texts(name) == ["of the parent", "of the parent again"]
    assert texts(name, pid) == ["of the child"]


def test_a_child_that_closes_the_handler_leaves_the_parents_ring(name: str, make_handler: MakeHandler) -> None:
    handler = make_handler()
    logging.getLogger(LOGGER).info("one")
    read_all(name)
    pid = os.fork()
    if pid == 0:
        handler.close()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    logging.getLogger(LOGGER).info("two")
    assert texts(name) == ["two"]


def test_forks_while_threads_log_leave_no_child_behind_a_lock(name: str, make_handler: MakeHandler) -> None:
    make_handler(1 << 16)
    stop = threading.Event()

    def log() -> None:
        while not stop.is_set():
            logging.getLogger(LOGGER).info("x")

    writer = threading.Thread(target=log)
    writer.start()
    children = []
    for _ in range(20):
        pid = os.fork()
        if pid == 0:
            logging.getLogger(LOGGER).info("of the child")
            os._exit(0)
        children.append(pid)
    statuses = [os.waitpid(pid, 0)[1] for pid in children]
    stop.set()
    writer.join()
    assert statuses == [0] * 20
    assert [texts(name, pid) for pid in children] == [["of the child"]] * 20


def log_numbers(handler: RingHandler, number: int) -> None:
    """In another process: log with a handler that came pickled or forked."""
    logger = logging.getLogger(LOGGER)
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.DEBUG)
    for count in range(100):
        logger.info("%d.%d", number, count)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_drain_that_follows_collects_all_processes_and_leaves_no_ring_behind(
    name: str, make_handler: MakeHandler, tmp_path: Path, method: str
) -> None:
    handler = make_handler()
    logging.getLogger(LOGGER).info("0.0")
    sink = FileSink(tmp_path / "log", "json", Selection())
    drain = Drain([sink], follow=f"mcr_{name}_")
    drain.start()
    context: Any = multiprocessing.get_context(method)
    processes = [context.Process(target=log_numbers, args=(handler, number)) for number in (1, 2, 3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    until(lambda: sink.written == 301, "all records")
    until(lambda: len(segments(name)) == 1, "the end of the children's rings")
    drain.stop()
    got = [line.partition('"message":"')[2].partition('"')[0] for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted(got) == sorted(["0.0", *(f"{number}.{count}" for number in (1, 2, 3) for count in range(100))])
    for number in (1, 2, 3):
        assert [text for text in got if text.startswith(f"{number}.")] == [f"{number}.{count}" for count in range(100)]
