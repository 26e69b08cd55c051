"""The file sink: every line whole and once, through rotation, moving, vanishing, and a disk that is really full."""

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logging_shm import Severity
from logging_shm.sinks.file import FileSink
from logging_shm.sinks.selection import SinkError
from logging_shm.sinks.url import Described
from tests.logging_shm.sink_harness import Feed, until

DISK_BYTES = 64 << 10


@pytest.fixture
def feed() -> Iterator[Feed]:
    with Feed() as feed:
        yield feed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", directory], check=True)
    yield directory
    subprocess.run(["umount", "--lazy", directory], check=True)


def texts(path: Path) -> list[str]:
    """The messages of a file, each a whole line."""
    content = path.read_text()
    assert not content or content.endswith("\n")
    found = [re.fullmatch(r"\[\w+\] \[Test\] (.*)", line) for line in content.splitlines()]
    assert all(found), content
    return [match[1] for match in found if match]


def rotated(path: Path) -> list[str]:
    """The messages of a file and all that it became, oldest first."""
    parts = sorted(path.parent.glob(f"{path.name}.*"), key=lambda part: -int(part.suffix[1:]))
    return [text for part in [*parts, path] if part.exists() for text in texts(part)]


def test_lines_are_appended_to_what_is_there(feed: Feed, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("[Info] [Test] old\n")
    path.chmod(0o604)
    sink = FileSink(path)
    feed.start(sink)
    feed.give(sink, "one", "two")
    sink.close()
    assert texts(path) == ["old", "one", "two"]
    assert path.stat().st_mode & 0o777 == 0o604
    assert (sink.written, sink.lost) == (2, 0)


def test_a_new_file_is_not_for_everybody(feed: Feed, tmp_path: Path) -> None:
    FileSink(tmp_path / "log").close_target()
    assert (tmp_path / "log").stat().st_mode & 0o027 == 0


def test_json_lines_carry_every_field(feed: Feed, tmp_path: Path) -> None:
    sink = Described(f"file:{tmp_path}/log?format=json").open()
    feed.start(sink)
    feed.give(sink, 'a "b" \\ \n', severity=Severity.Error, rule='"')
    sink.close()
    line = json.loads((tmp_path / "log").read_text())
    assert (line["severity"], line["facility"], line["message"]) == ("Error", "Test", 'a "b" \\ \\n')
    assert (line["core"], line["pid"], line["sequence"], line["pairs"]) == (None, os.getpid(), 0, {"rule": '"'})


def test_behind_a_line_that_somebody_could_not_finish_lines_are_whole(feed: Feed, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("[Info] [Te")
    sink = FileSink(path)
    feed.start(sink)
    feed.give(sink, "one")
    sink.close()
    assert path.read_text() == "[Info] [Te\n[Info] [Test] one\n"


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_rotation_by_size_keeps_every_line_whole_and_once_and_no_file_grows_over_it(
    feed: Feed, tmp_path: Path, batch: int
) -> None:
    path = tmp_path / "log"
    sink = FileSink(path, rotate_bytes=2000, keep=100)
    feed.start(sink)
    numbers = [str(number) for number in range(1000)]
    for at in range(0, 1000, batch):
        feed.give(sink, *numbers[at : at + batch])
    sink.close()
    assert rotated(path) == numbers
    assert len(list(tmp_path.iterdir())) > 5
    assert all(part.stat().st_size <= 2000 for part in tmp_path.iterdir())
    assert (sink.written, sink.lost) == (1000, 0)


@given(lengths=st.lists(st.integers(0, 120), max_size=60), rotate_bytes=st.integers(1, 500))
@settings(max_examples=40)
def test_whatever_the_sizes_no_line_is_split_or_lost(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], rotate_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("rotation") / "log"
    with Feed() as feed:
        sink = FileSink(path, rotate_bytes=rotate_bytes, keep=1000)
        feed.start(sink)
        feed.give(sink, *("x" * length for length in lengths))
        sink.close()
    assert [len(text) for text in rotated(path)] == lengths


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_of_rotated_files_the_newest_are_kept(feed: Feed, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "log"
    sink = FileSink(path, rotate_bytes=50, keep=keep)
    feed.start(sink)
    numbers = [str(number) for number in range(100)]
    feed.give(sink, *numbers)
    sink.close()
    assert len(list(tmp_path.iterdir())) == keep + 1
    kept = rotated(path)
    assert kept == numbers[-len(kept) :]


def test_an_old_file_is_rotated_though_nothing_is_written(feed: Feed, tmp_path: Path) -> None:
    path = tmp_path / "log"
    sink = FileSink(path, rotate_s=0.5, keep=2)
    feed.start(sink)
    feed.give(sink, "one")
    until((tmp_path / "log.1").exists, "the rotation")
    feed.give(sink, "two")
    until((tmp_path / "log.2").exists, "the second rotation")
    sink.close()
    assert rotated(path) == ["one", "two"]


def test_a_rotation_that_fails_is_told_once_and_the_file_grows_on(feed: Feed, tmp_path: Path) -> None:
    path = tmp_path / "log"
    (tmp_path / "log.1" / "in the way").mkdir(parents=True)
    sink = FileSink(path, rotate_bytes=100, keep=1)
    feed.start(sink)
    feed.give(sink, *map(str, range(50)))
    feed.give(sink, *map(str, range(50, 100)))
    sink.close()
    assert texts(path) == list(map(str, range(100)))
    (error,) = feed.told_of(Severity.Error)
    assert "can't be rotated: Is a directory: it grows on" in error


def test_a_file_that_was_moved_away_is_followed_by_a_new_one(feed: Feed, tmp_path: Path) -> None:
    path, moved = tmp_path / "log", tmp_path / "moved"
    sink = FileSink(path)
    feed.start(sink)
    feed.give(sink, "before")
    until(lambda: sink.written == 1, "the line")
    path.rename(moved)
    feed.give(sink, "after")
    sink.reopen()
    feed.give(sink, "later")
    sink.close()
    assert (texts(moved), texts(path)) == (["before"], ["after", "later"])


def test_a_file_that_vanished_is_made_anew(feed: Feed, tmp_path: Path) -> None:
    path = tmp_path / "log"
    sink = FileSink(path)
    feed.start(sink)
    feed.give(sink, "before")
    until(lambda: sink.written == 1, "the line")
    path.unlink()
    feed.give(sink, "after")
    sink.close()
    assert texts(path) == ["after"]


def test_reopening_opens_what_is_under_the_path_now(feed: Feed, tmp_path: Path) -> None:
    path = tmp_path / "log"
    sink = FileSink(path)
    feed.start(sink)
    before = open_files(path)
    sink.reopen()
    until(lambda: not open_files(path), "the closing")
    feed.give(sink, "one")
    sink.close()
    assert before
    assert texts(path) == ["one"]


def open_files(path: Path) -> list[str]:
    links = [link for link in Path("/proc/self/fd").iterdir() if os.path.lexists(link)]
    return [link.name for link in links if os.path.realpath(link) == str(path)]


def test_a_directory_that_vanished_is_an_error_until_it_is_back(feed: Feed, tmp_path: Path) -> None:
    path = tmp_path / "logs" / "log"
    path.parent.mkdir()
    sink = FileSink(path)
    feed.start(sink)
    path.unlink()
    path.parent.rmdir()
    feed.give(sink, "meanwhile")
    until(lambda: feed.told_of(Severity.Error), "the error")
    path.parent.mkdir()
    until(lambda: feed.told_of(Severity.Notice), "the notice")
    sink.close()
    assert texts(path) == ["meanwhile"]
    assert "No such file or directory: lines wait, then are lost" in feed.told_of(Severity.Error)[0]


def test_lines_wait_for_a_full_disk_and_are_written_whole_and_once(feed: Feed, small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(40 << 10))
    path = small_disk / "log"
    sink = FileSink(path)
    feed.start(sink)
    numbers = [f"{number:04d} {'x' * 50}" for number in range(700)]
    for at in range(0, 700, 100):
        feed.give(sink, *numbers[at : at + 100])
    until(lambda: feed.told_of(Severity.Error), "the error")
    full = texts(path)  # no line is torn
    assert 0 < len(full) < 700
    ballast.unlink()
    until(lambda: feed.told_of(Severity.Notice), "the notice")
    sink.close()
    assert full == numbers[: len(full)]
    assert texts(path) == numbers
    assert (sink.written, sink.lost) == (700, 0)
    assert "No space left on device: lines wait, then are lost" in feed.told_of(Severity.Error)[0]
    assert feed.told_of(Severity.Notice)[0].endswith(", 0 lines lost")
    assert len(feed.told) == 2


def test_lines_that_a_full_disk_cost_are_counted_and_told_when_it_is_over(
    feed: Feed, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(60 << 10))
    path = small_disk / "log"
    sink = FileSink(path)
    monkeypatch.setattr(sink, "_backlog_bytes_max", 10_000)
    feed.start(sink)
    feed.give(sink, *["x" * 150] * 40)
    until(lambda: feed.told_of(Severity.Error), "the error")
    for number in range(960):
        feed.give(sink, f"{number:04d} {'x' * 50}")
    assert sink.lost > 0
    ballast.unlink()
    until(lambda: feed.told_of(Severity.Notice), "the notice")
    lost = sink.lost
    feed.give(sink, "after")
    sink.close()
    assert feed.told_of(Severity.Notice)[0].endswith(f", {lost} lines lost")
    assert [severity for severity, _ in feed.told] == [Severity.Error, Severity.Notice]
    assert (sink.written, sink.lost) == (1001 - lost, lost)
    assert len(texts(path)) == sink.written
    assert texts(path)[-1] == "after"


def test_a_disk_that_stays_full_ends_with_whole_lines_and_an_exact_count(feed: Feed, small_disk: Path) -> None:
    path = small_disk / "log"
    sink = FileSink(path)
    feed.start(sink)
    feed.give(sink, *["x" * 150] * 1000)
    until(lambda: feed.told_of(Severity.Error), "the error")
    sink.close()
    assert len(texts(path)) == sink.written > 0
    assert sink.written + sink.lost == 1000


def test_rotation_goes_on_when_a_full_disk_has_room_again(feed: Feed, small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(40 << 10))
    path = small_disk / "log"
    sink = FileSink(path, rotate_bytes=4000, keep=20)
    feed.start(sink)
    numbers = [f"{number:04d} {'x' * 50}" for number in range(500)]
    feed.give(sink, *numbers)
    until(lambda: feed.told_of(Severity.Error), "the error")
    ballast.unlink()
    until(lambda: sink.written == 500, "all lines")
    sink.close()
    assert rotated(path) == numbers


def test_dev_full_is_an_error_that_lasts_and_nothing_counts_as_written(feed: Feed) -> None:
    sink = FileSink("/dev/full")
    feed.start(sink)
    feed.give(sink, "one", "two")
    until(lambda: feed.told_of(Severity.Error), "the error")
    sink.close()
    assert (sink.written, sink.lost) == (0, 2)


def link(path: Path) -> None:
    path.symlink_to("elsewhere")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (link, "it is a symbolic link"),
        (Path.mkdir, "Is a directory"),
        (os.mkfifo, "it is neither a file nor a character device"),
        (lambda path: path.parent.rmdir(), "No such file or directory"),
    ],
)
@pytest.mark.parametrize("step", ["check", "open"])
def test_a_path_that_can_not_be_written_is_told_at_start_and_why(
    tmp_path: Path, make: Any, reason: str, step: str
) -> None:
    path = tmp_path / "logs" / "log"
    path.parent.mkdir()
    make(path)
    described = Described(f"file:{path}")
    with pytest.raises(SinkError) as refusal:
        getattr(described, step)()
    assert str(refusal.value) == f"log sink {described.url!r}: {reason}: choose a path that can be written"


@pytest.fixture
def nobody(tmp_path: Path) -> Iterator[None]:
    """File permissions hold for root, too, meanwhile."""
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(parent.stat().st_mode | 0o011)
    os.seteuid(65_534)
    yield
    os.seteuid(0)


@pytest.mark.parametrize("step", ["check", "open"])
@pytest.mark.usefixtures("nobody")
def test_a_directory_without_permission_is_told_at_start(tmp_path: Path, step: str) -> None:
    with pytest.raises(SinkError, match="Permission denied: choose a path that can be written"):
        getattr(Described(f"file:{tmp_path}/log"), step)()


def test_checking_leaves_no_file_behind(tmp_path: Path) -> None:
    Described(f"file:{tmp_path}/log").check()
    assert list(tmp_path.iterdir()) == []


def test_times_are_the_wall_clocks(feed: Feed, tmp_path: Path) -> None:
    sink = Described(f"file:{tmp_path}/log?timestamps=yes").open()
    before = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(time.time() - 1))
    feed.start(sink)
    feed.give(sink, "x")
    sink.close()
    shown = (tmp_path / "log").read_text().split()[0]
    assert before <= shown <= time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(time.time() + 1))
