"""The stream sink: pipes whose reader stops or goes, streams that don't block or are closed, terminals and colour."""

import errno
import os
import pty
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from logging_shm import Severity
from logging_shm.sinks.stream import ROOM_MS, StreamSink
from tests.logging_shm.sink_harness import Feed, until

MANY = [f"{number:04d} {'x' * 100}" for number in range(4000)]  # more than a pipe holds


@pytest.fixture
def feed() -> Iterator[Feed]:
    with Feed() as feed:
        yield feed


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """The reading and the writing end."""
    reading, writing = os.pipe()
    yield reading, writing
    for fd in (reading, writing):
        close_quietly(fd)


def close_quietly(fd: int) -> None:
    try:
        os.close(fd)
    except OSError as error:
        assert error.errno == errno.EBADF


def lines(count: int, fd: int) -> list[str]:
    """So many lines, read in pieces."""
    content = b""
    while content.count(b"\n") < count:
        piece = os.read(fd, 10_000)
        assert piece
        content += piece
    assert content.endswith(b"\n")
    return content.decode().splitlines()


def shown(text: str) -> str:
    return f"[Info] [Test] {text}"


def test_lines_are_written_plain_to_a_pipe(feed: Feed, pipe: tuple[int, int]) -> None:
    sink = StreamSink(pipe[1])
    feed.start(sink)
    feed.give(sink, "one", "é")
    assert lines(2, pipe[0]) == [shown("one"), shown("é")]


@pytest.mark.parametrize("blocking", [True, False])
def test_a_reader_that_stopped_gets_every_line_once_when_it_goes_on(
    feed: Feed, pipe: tuple[int, int], blocking: bool
) -> None:
    os.set_blocking(pipe[1], blocking)
    sink = StreamSink(pipe[1])
    feed.start(sink)
    feed.give(sink, *MANY)
    until(lambda: sink.written > 500, "a full pipe")
    assert lines(len(MANY), pipe[0]) == [shown(text) for text in MANY]
    until(lambda: sink.written == len(MANY), "the count")
    assert feed.told == []
    assert os.get_blocking(pipe[1]) is blocking


@pytest.mark.parametrize("blocking", [True, False])
def test_a_socket_in_the_place_of_a_pipe_loses_nothing(feed: Feed, blocking: bool) -> None:
    reading, writing = socket.socketpair()
    with reading, writing:
        writing.setblocking(blocking)
        sink = StreamSink(writing.fileno())
        feed.start(sink)
        feed.give(sink, *MANY)
        assert lines(len(MANY), reading.fileno()) == [shown(text) for text in MANY]


class CountingSink(StreamSink):
    """Counts how often it tries to write."""

    tries = 0

    def _write(self, data: memoryview) -> int:
        self.tries += 1
        return super()._write(data)


@pytest.mark.parametrize("blocking", [True, False])
def test_a_sink_does_not_spin_while_its_reader_is_away(feed: Feed, pipe: tuple[int, int], blocking: bool) -> None:
    os.set_blocking(pipe[1], blocking)
    sink = CountingSink(pipe[1])
    feed.start(sink)
    feed.give(sink, *MANY)
    until(lambda: sink.written > 500, "a full pipe")
    since_s, tries = time.monotonic(), sink.tries
    until(lambda: sink.tries >= tries + 6, "six tries")
    # The pipe may take a few more pieces at first.
    assert time.monotonic() - since_s > 2 * ROOM_MS / 1000


def test_a_reader_that_stays_away_holds_nobody_at_the_end_and_the_rest_is_counted(
    feed: Feed, pipe: tuple[int, int]
) -> None:
    sink = StreamSink(pipe[1])
    feed.start(sink)
    feed.give(sink, *MANY)
    sink.close()
    assert sink.lost > 0
    assert sink.written + sink.lost == len(MANY)
    sink._thread.join(30)
    assert not sink._thread.is_alive()
    os.close(pipe[1])
    with os.fdopen(os.dup(pipe[0]), "rb") as rest:
        assert rest.read().count(b"\n") == sink.written


def test_a_reader_that_went_is_told_once_and_lines_are_counted(feed: Feed, pipe: tuple[int, int]) -> None:
    sink = StreamSink(pipe[1])
    feed.start(sink)
    os.close(pipe[0])
    feed.give(sink, "one", "two")
    until(lambda: feed.told, "the error")
    feed.give(sink, "three")
    sink.close()
    ((severity, message),) = feed.told
    assert severity is Severity.Error
    assert message.endswith("Broken pipe: lines wait, then are lost")
    assert (sink.written, sink.lost) == (0, 3)


def test_a_stream_that_was_closed_is_told_once(feed: Feed, pipe: tuple[int, int]) -> None:
    copy = os.dup(pipe[1])
    os.dup2(copy, 900)
    os.close(copy)
    sink = StreamSink(900)
    os.close(900)
    feed.start(sink)
    feed.give(sink, "one")
    until(lambda: feed.told, "the error")
    sink.close()
    assert "Bad file descriptor" in feed.told[0][1]
    assert (sink.written, sink.lost) == (0, 1)


def test_a_program_without_standard_output_is_refused_and_writes_into_nothing_else() -> None:
    program = """
import os, sys
from logging_shm.sinks.selection import SinkError
from logging_shm.sinks.url import Described
try:
    Described("stdout:").open()
except SinkError as error:
    print(error, file=sys.stderr)
"""
    started = subprocess.run(
        ["sh", "-c", 'exec "$0" -c "$1" >&-', sys.executable, program], stderr=subprocess.PIPE, check=True
    )
    expected = "log sink 'stdout:': standard output is closed: open it, or choose another sink\n"
    assert started.stderr.decode() == expected


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """The screen's side and the program's."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    screen, program = pty.openpty()
    yield screen, program
    os.close(screen)
    os.close(program)


def test_a_terminal_gets_colours_by_severity(feed: Feed, terminal: tuple[int, int]) -> None:
    sink = StreamSink(terminal[1])
    feed.start(sink)
    feed.give(sink, "broken", severity=Severity.Error)
    feed.give(sink, "fine", severity=Severity.Info)
    assert lines(2, terminal[0]) == ["\033[31m[Error] [Test] broken\033[0m", "\033[0m[Info] [Test] fine\033[0m"]


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_who_wants_no_colours_gets_none(
    feed: Feed, terminal: tuple[int, int], monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    sink = StreamSink(terminal[1])
    feed.start(sink)
    feed.give(sink, "one")
    assert lines(1, terminal[0]) == [shown("one")]


def test_an_empty_no_color_means_nothing(
    feed: Feed, terminal: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "")
    sink = StreamSink(terminal[1])
    feed.start(sink)
    feed.give(sink, "one")
    assert lines(1, terminal[0]) == [f"\033[0m{shown('one')}\033[0m"]


def test_json_on_a_terminal_has_no_colours(feed: Feed, terminal: tuple[int, int]) -> None:
    sink = StreamSink(terminal[1], "json")
    feed.start(sink)
    feed.give(sink, "one", severity=Severity.Error)
    assert lines(1, terminal[0])[0].startswith('{"time":')
