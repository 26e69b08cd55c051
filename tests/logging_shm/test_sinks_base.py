"""What all sinks do: choose, count exactly, tell of themselves once, end in time, and leave each other alone."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logging_shm import Drain, Facility, Severity
from logging_shm.sinks import base
from logging_shm.sinks.base import Chunk, Sink, messages
from logging_shm.sinks.file import FileSink
from logging_shm.sinks.selection import Selection
from logging_shm.sinks.stream import StreamSink
from tests.logging_shm.sink_harness import Feed, until


class Gate(Sink):
    """A sink whose target does what a test says: waits at a gate, fails, or takes what it is given."""

    def __init__(self, selection: Selection | None = None, backlog_bytes: int = 1 << 20) -> None:
        super().__init__("gate", "text", selection, backlog_bytes)
        self.open = threading.Event()
        self.waits = threading.Event()
        self.failure: Exception | None = None
        self.fails_at = 0  # so many messages of a call are taken before the failure
        self.refuses: set[str] = set()
        self.got: list[str] = []
        self.tries = 0

    def deliver(self, chunk: Chunk) -> None:
        self.tries += 1
        self.waits.set()
        self.open.wait()
        for index, message in enumerate(messages(chunk, self.done)):
            if self.failure and index >= self.fails_at:
                raise self.failure
            text = message.decode().partition("] [Test] ")[2].rstrip("\n")
            if text in self.refuses:
                self.refuse("no such thing")
                continue
            self.got.append(text)
            self.advance(1)

    def close_target(self) -> None:
        pass


@pytest.fixture
def feed() -> Iterator[Feed]:
    with Feed() as feed:
        yield feed


@pytest.fixture
def gate(feed: Feed) -> Iterator[Gate]:
    gate = Gate()
    feed.start(gate)
    yield gate
    gate.open.set()


@pytest.fixture
def narrow(feed: Feed) -> Iterator[Gate]:
    """A gate with a backlog of a few lines."""
    gate = Gate(backlog_bytes=200)
    feed.start(gate)
    yield gate
    gate.open.set()


def test_what_is_accepted_is_delivered_in_order(feed: Feed, gate: Gate) -> None:
    gate.open.set()
    texts = [str(number) for number in range(2000)]
    for at in range(0, 2000, 50):
        feed.give(gate, *texts[at : at + 50])
    gate.close()
    assert gate.got == texts
    assert (gate.written, gate.lost) == (2000, 0)


@given(sizes=st.lists(st.integers(1, 40), max_size=40))
@settings(max_examples=25)
def test_chunks_that_wait_are_joined_without_losing_where_a_message_ends(sizes: list[int]) -> None:
    with Feed() as feed:
        gate = Gate()
        feed.start(gate)
        texts = [f"{index}.{number}" for index, size in enumerate(sizes) for number in range(size)]
        left = list(texts)
        for size in sizes:
            feed.give(gate, *left[:size])
            del left[:size]
        gate.open.set()
        gate.close()
        assert gate.got == texts
        assert gate.tries <= 3


@pytest.mark.parametrize("level", list(Severity))
def test_a_level_lets_pass_what_is_as_grave(feed: Feed, level: Severity) -> None:
    gate = Gate(Selection(level=level))
    gate.open.set()
    feed.start(gate)
    for severity in Severity:
        feed.give(gate, severity.name, severity=severity)
    gate.close()
    assert gate.got == [severity.name for severity in Severity if severity <= level]


def test_a_facility_that_was_not_chosen_does_not_pass(feed: Feed) -> None:
    gate = Gate(Selection(facilities=frozenset(Facility) - {Facility.Test}))
    gate.open.set()
    feed.start(gate)
    feed.give(gate, "x")
    gate.close()
    assert (gate.got, gate.written, gate.lost) == ([], 0, 0)


def test_a_full_backlog_is_told_at_once_and_its_losses_when_it_is_over(feed: Feed, narrow: Gate) -> None:
    feed.give(narrow, "first")
    narrow.waits.wait()
    for number in range(100):
        feed.give(narrow, str(number))
    assert feed.told == [(Severity.Warning, "Log sink gate is too slow: its backlog is full, lines are lost")]
    lost = narrow.lost
    assert lost > 80
    narrow.open.set()
    until(lambda: feed.told_of(Severity.Notice), "the notice")
    feed.give(narrow, "later")
    narrow.close()
    assert feed.told_of(Severity.Notice) == [f"Log sink gate keeps up again, {lost} lines lost"]
    assert len(feed.told) == 2
    assert narrow.got == ["first", *map(str, range(100 - lost)), "later"]
    assert (narrow.written, narrow.lost) == (102 - lost, lost)


def test_a_second_overrun_is_told_with_its_own_number(feed: Feed, narrow: Gate) -> None:
    told = []
    for _ in range(2):
        narrow.open.clear()
        narrow.waits.clear()
        feed.give(narrow, "first")
        narrow.waits.wait()
        before = narrow.lost
        for number in range(100):
            feed.give(narrow, str(number))
        told.append(f"Log sink gate keeps up again, {narrow.lost - before} lines lost")
        narrow.open.set()
        until(lambda: feed.told_of(Severity.Notice) == told, "the notice")
    assert len(feed.told_of(Severity.Warning)) == 2


@pytest.mark.parametrize("taken", [0, 1, 2, 5])
def test_a_failure_between_messages_repeats_and_loses_none(feed: Feed, gate: Gate, taken: int) -> None:
    gate.failure, gate.fails_at = OSError(28, "No space"), taken
    gate.open.set()
    feed.give(gate, *map(str, range(6)))
    until(lambda: feed.told, "the error")
    gate.failure = None
    until(lambda: gate.written == 6, "all messages")
    gate.close()
    assert gate.got == list(map(str, range(6)))
    assert (gate.written, gate.lost) == (6, 0)
    assert feed.told[0] == (Severity.Error, "Log sink gate: No space: lines wait, then are lost")
    assert feed.told[1][1].endswith(" s, 0 lines lost")


def test_a_failure_that_ends_within_close_is_counted_to_the_message(feed: Feed, gate: Gate) -> None:
    gate.failure, gate.fails_at = OSError(28, "No space"), 2
    gate.open.set()
    feed.give(gate, *map(str, range(7)))
    until(lambda: feed.told, "the error")
    gate.close()
    assert gate.got == list(map(str, range(gate.written)))
    assert gate.written + gate.lost == 7
    assert gate.lost > 0


def test_a_mistake_in_a_sink_is_told_and_its_thread_goes_on(feed: Feed, gate: Gate) -> None:
    gate.failure = ValueError("a mistake")
    gate.open.set()
    feed.give(gate, "one")
    until(lambda: feed.told, "the error")
    gate.failure = None
    until(lambda: gate.written == 1, "the message")
    assert feed.told[0][1] == "Log sink gate: ValueError: a mistake: lines wait, then are lost"


def test_a_message_that_is_refused_is_lost_alone_and_told_with_its_reason(feed: Feed, gate: Gate) -> None:
    gate.refuses = {"b", "c"}
    gate.open.set()
    feed.give(gate, "a", "b", "c", "d")
    until(lambda: feed.told, "the error")
    feed.give(gate, "e")
    until(lambda: feed.told_of(Severity.Notice), "the notice")
    assert gate.got == ["a", "d", "e"]
    assert (gate.written, gate.lost) == (3, 2)
    assert feed.told[0] == (Severity.Error, "Log sink gate: no such thing: lines are lost")
    assert feed.told[1][1].endswith(", 2 lines lost")


def test_a_sink_that_hangs_is_left_behind_and_what_it_holds_is_lost(feed: Feed, gate: Gate) -> None:
    feed.give(gate, *map(str, range(10)))
    gate.waits.wait()
    feed.give(gate, *map(str, range(10)))
    gate.close()
    assert (gate.written, gate.lost) == (0, 20)
    gate.open.set()
    gate._thread.join(30)
    assert not gate._thread.is_alive()
    assert (gate.written, gate.lost) == (0, 20)


def test_what_comes_after_the_end_is_lost_and_counted_and_a_second_end_changes_nothing(feed: Feed, gate: Gate) -> None:
    gate.open.set()
    feed.give(gate, "one")
    gate.close()
    feed.give(gate, "two", "three")
    gate.close()
    assert (gate.got, gate.written, gate.lost) == (["one"], 1, 2)
    assert feed.told == []


def test_a_sink_that_was_never_started_counts_what_it_got_as_lost(feed: Feed) -> None:
    gate = Gate()
    feed.give(gate, "one", "two")
    gate.close()
    assert (gate.written, gate.lost) == (0, 2)


def test_a_target_that_can_not_be_closed_is_told_and_the_sink_goes_on(
    feed: Feed, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise OSError(122, "Disk quota exceeded")

    gate.open.set()
    monkeypatch.setattr(gate, "close_target", fail)
    gate.reopen()
    until(lambda: feed.told, "the error")
    feed.give(gate, "one")
    until(lambda: gate.written == 1, "the message")
    assert feed.told[0][1] == "Log sink gate: Disk quota exceeded: lines wait, then are lost"


def test_reopening_tries_a_failed_sink_at_once(feed: Feed, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "RETRY_S_MIN", 1e6)
    monkeypatch.setattr(base, "RETRY_S_MAX", 1e6)
    gate.failure = OSError(2, "No such file")
    gate.open.set()
    feed.give(gate, "one")
    until(lambda: feed.told, "the error")
    gate.failure = None
    gate.reopen()
    until(lambda: gate.written == 1, "the message")


def test_accepting_waits_for_no_target_in_maintenance(feed: Feed, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, finish = threading.Event(), threading.Event()

    def slow_maintenance() -> None:
        begun.set()
        finish.wait()

    monkeypatch.setattr(gate, "maintain", slow_maintenance)
    gate.reopen()
    begun.wait()
    feed.give(gate, "accepted")  # would never return if the maintenance held what accepting needs
    gate.open.set()
    finish.set()
    until(lambda: gate.got == ["accepted"], "the message")


def test_a_long_name_leaves_room_for_what_is_said_of_it() -> None:
    sink = Gate()
    Sink.__init__(sink, "file /" + "directory/" * 30 + "the.log")
    assert len(sink.name) == 60
    assert sink.name.startswith("file /directory/")
    assert sink.name.endswith("/the.log")


def test_several_sinks_each_get_what_they_want_though_one_hangs_and_one_fails(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with Feed() as feed:
        hanging = Gate()
        failing = FileSink("/dev/full")
        plain = FileSink(tmp_path / "plain")
        grave = FileSink(tmp_path / "grave", selection=Selection(level=Severity.Warning))
        piped = StreamSink(writing, "json")
        drain = Drain([hanging, failing, plain, grave, piped])
        drain.add([feed.ring])
        drain.start()
        for number in range(50):
            feed.ring.append(Severity.Warning if number % 2 else Severity.Info, str(number))
        until(lambda: plain.written >= 50 and piped.written >= 50, "all lines")
        until(lambda: failing.name in (tmp_path / "plain").read_text(), "the failure in the other sinks")
        drain.stop()
        hanging.open.set()
    shown = [line for line in (tmp_path / "plain").read_text().splitlines() if "Log sink" not in line]
    assert [line.rpartition(" ")[2] for line in shown] == list(map(str, range(50)))
    graver = [line for line in (tmp_path / "grave").read_text().splitlines() if "Log sink" not in line]
    assert [line.rpartition(" ")[2] for line in graver] == list(map(str, range(1, 50, 2)))
    assert hanging.written == 0
    assert hanging.lost >= 50
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.read().count(b"\n") == piped.written


def in_child(act: Any) -> int:
    """Run something in a forked child; return its exit status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            act()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_forked_child_has_the_sink_empty_and_can_start_it_anew(feed: Feed, tmp_path: Path) -> None:
    sink, gate = FileSink(tmp_path / "log"), Gate()
    feed.start(sink)
    feed.start(gate)
    feed.give(gate, "of the parent")
    gate.waits.wait()

    def act() -> None:
        with Feed() as own:
            own.start(sink)
            own.give(sink, "of the child")
            sink.close()
            gate.close()
            assert (sink.written, gate.lost) == (1, 0)

    assert in_child(act) == 0
    feed.give(sink, "of the parent")
    sink.close()
    assert [line.split("] ")[-1] for line in (tmp_path / "log").read_text().splitlines()] == [
        "of the child",
        "of the parent",
    ]
    gate.open.set()
    until(lambda: gate.got == ["of the parent"], "the parent's message")


def test_a_fork_while_a_sink_holds_its_lock_leaves_the_child_a_lock_of_its_own(feed: Feed, gate: Gate) -> None:
    gate.open.set()
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with gate._wake:
            held.set()
            release.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    status = in_child(gate.close)
    release.set()
    holder.join()
    assert status == 0
