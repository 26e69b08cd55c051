"""Drained records in Python's `logging`: their levels, fields and times, handlers that raise, other processes."""

import logging
import multiprocessing
import os
import pickle
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from logging_shm import Facility, RingHandler, Severity
from logging_shm.sinks.selection import Selection
from logging_shm.sinks.stdlib import StdlibSink
from tests.logging_shm.sink_harness import Feed, until


class Keeper(logging.Handler):
    """Keeps records; raises for those that it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.poison: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() in self.poison:
            raise ConnectionError("the other side is gone")
        self.records.append(record)

    def messages(self) -> list[str]:
        return [record.getMessage() for record in self.records]


@pytest.fixture
def feed() -> Iterator[Feed]:
    with Feed(Facility.Ingress, core=1) as feed:
        yield feed


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    """The handler of the logger `sink-test`."""
    keeper, logger = Keeper(), logging.getLogger("sink-test")
    logger.addHandler(keeper)
    logger.propagate = False
    logger.setLevel(logging.DEBUG)
    yield keeper
    logger.removeHandler(keeper)


def sink_for(selection: Selection | None = None) -> StdlibSink:
    return StdlibSink(logging.getLogger("sink-test"), selection)


def test_a_record_keeps_what_its_writer_gave_it(feed: Feed, keeper: Keeper) -> None:
    sink = sink_for()
    feed.start(sink)
    before_s = time.time()
    feed.give(sink, '100% "sure" {}', severity=Severity.Error, rule="tv")
    until(lambda: keeper.records, "the record")
    (record,) = keeper.records
    fields = record.__dict__
    assert record.getMessage() == '100% "sure" {}'
    assert (record.name, record.levelname) == ("sink-test", "ERROR")
    assert (record.process, record.thread) == (os.getpid(), threading.get_native_id())
    assert (fields["facility"], fields["severity"], fields["core"]) == ("Ingress", "Error", 1)
    assert (fields["sequence"], fields["pairs"]) == (0, {"rule": "tv"})
    assert before_s - 0.001 <= record.created <= time.time()


def test_the_time_of_a_record_is_when_it_was_written(feed: Feed, keeper: Keeper) -> None:
    sink = sink_for()
    feed.start(sink)
    feed.ring.append(Severity.Info, "an hour ago", timestamp_ns=time.monotonic_ns() - 3600 * 10**9)
    feed.give(sink)
    until(lambda: keeper.records, "the record")
    (record,) = keeper.records
    age_s = time.time() - record.created
    assert 3599 < age_s < 3600 + 60
    assert record.msecs == pytest.approx(record.created % 1 * 1000)
    assert (
        logging.Formatter("%(asctime)s")
        .format(record)
        .startswith(time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created)))
    )


@pytest.mark.parametrize(
    ("severity", "level", "name"),
    [
        (Severity.Emergency, 70, "EMERGENCY"),
        (Severity.Alert, 60, "ALERT"),
        (Severity.Critical, logging.CRITICAL, "CRITICAL"),
        (Severity.Error, logging.ERROR, "ERROR"),
        (Severity.Warning, logging.WARNING, "WARNING"),
        (Severity.Notice, 25, "NOTICE"),
        (Severity.Info, logging.INFO, "INFO"),
        (Severity.Debug, logging.DEBUG, "DEBUG"),
    ],
)
def test_every_severity_has_a_level_of_its_own(
    feed: Feed, keeper: Keeper, severity: Severity, level: int, name: str
) -> None:
    sink = sink_for()
    feed.start(sink)
    feed.give(sink, "x", severity=severity)
    until(lambda: keeper.records, "the record")
    assert (keeper.records[0].levelno, keeper.records[0].levelname) == (level, name)


def test_the_loggers_own_level_and_the_selection_both_filter(feed: Feed, keeper: Keeper) -> None:
    logging.getLogger("sink-test").setLevel(logging.WARNING)
    sink = sink_for(Selection(level=Severity.Notice))
    feed.start(sink)
    for severity in Severity:
        feed.give(sink, severity.name, severity=severity)
    sink.close()
    assert keeper.messages() == ["Emergency", "Alert", "Critical", "Error", "Warning"]
    assert (sink.written, sink.lost) == (6, 0)


def test_a_handler_that_raises_costs_that_record_alone_and_is_told(feed: Feed, keeper: Keeper) -> None:
    sink = sink_for()
    keeper.poison = {"two"}
    feed.start(sink)
    feed.give(sink, "one", "two", "three")
    feed.give(sink, "four")
    sink.close()
    assert keeper.messages() == ["one", "three", "four"]
    assert (sink.written, sink.lost) == (3, 1)
    assert feed.told_of(Severity.Error) == [
        "Log sink logging sink-test: ConnectionError: the other side is gone: lines are lost"
    ]
    assert feed.told_of(Severity.Notice)[0].endswith(", 1 lines lost")


def test_a_ring_handler_on_the_same_logger_makes_no_circle(feed: Feed, keeper: Keeper) -> None:
    handler = RingHandler(f"circle{os.getpid()}")
    logging.getLogger("sink-test").addHandler(handler)
    try:
        sink = sink_for()
        feed.start(sink)
        feed.give(sink, "from a ring")
        until(lambda: keeper.records, "the record")
        assert handler._ring is None
    finally:
        logging.getLogger("sink-test").removeHandler(handler)
        handler.close()


def test_a_pickled_sink_is_a_new_one_of_the_same_logger(feed: Feed, keeper: Keeper) -> None:
    first = sink_for(Selection(level=Severity.Error))
    feed.start(first)
    feed.give(first, "one", severity=Severity.Error)
    until(lambda: first.written == 1, "the record")
    second = pickle.loads(pickle.dumps(first))
    feed.start(second)
    feed.give(second, "two", severity=Severity.Error)
    feed.give(second, "not wanted", severity=Severity.Warning)
    second.close()
    assert keeper.messages() == ["one", "two"]
    assert (second.written, second.lost) == (1, 0)


def deliver_one(sink: StdlibSink, answers: Any) -> None:
    """In another process: the sink works there."""
    keeper, logger = Keeper(), logging.getLogger("sink-test")
    logger.handlers, logger.propagate = [keeper], False
    logger.setLevel(logging.DEBUG)
    with Feed() as feed:
        feed.start(sink)
        feed.give(sink, "over there")
        sink.close()
    answers.put((keeper.messages(), sink.written, sink.lost))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_sink_works_in_another_process(feed: Feed, keeper: Keeper, method: str) -> None:
    sink = sink_for()
    feed.start(sink)
    feed.give(sink, "here")
    until(lambda: sink.written == 1, "the record")
    context: Any = multiprocessing.get_context(method)
    answers = context.SimpleQueue()
    process = context.Process(target=deliver_one, args=(sink, answers))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    messages, written, lost = answers.get()
    assert messages == ["over there"]
    assert (written, lost) == (1, 0)
    assert keeper.messages() == ["here"]
