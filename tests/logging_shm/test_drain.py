"""The drain: every ring is read, merged by time, written as lines; no sink and no ring stops it."""

import io
import json
import time
from collections.abc import Callable

import pytest
from click.testing import CliRunner

from logging_shm import Drain, Facility, LogEntry, Logger, Severity, SharedSPSCRingBuffer
from logging_shm.cli import main

MakeRing = Callable[..., SharedSPSCRingBuffer]


def write(ring: SharedSPSCRingBuffer, message: str, timestamp_ns: int = 0) -> None:
    ring.write(LogEntry(Severity.Info, Facility.Test, message, timestamp_ns=timestamp_ns))


def test_records_of_several_rings_are_merged_by_time(make_ring: MakeRing) -> None:
    first, second = make_ring(), make_ring()
    for at in range(6):
        write((first, second)[at % 2], f"at {at}", at)
    out = io.StringIO()
    drain = Drain(out)
    drain.add([first, second])
    drain.start()
    drain.stop()
    assert out.getvalue().splitlines() == [f"[Info] [Test] at {at}" for at in range(6)]


def test_json_lines_carry_every_field(make_ring: MakeRing) -> None:
    ring = make_ring(core=3)
    Logger(ring, Facility.Test).error("broken", rule="tv")
    out = io.StringIO()
    drain = Drain(out, as_json=True)
    drain.add([ring])
    drain.start()
    drain.stop()
    line = json.loads(out.getvalue())
    assert (line["severity"], line["facility"], line["message"], line["core"], line["rule"]) == (
        "Error", "Test", "broken", 3, "tv",
    )  # fmt: skip


def test_a_full_ring_is_reported_as_a_gap(make_ring: MakeRing) -> None:
    ring = make_ring(2)
    for at in range(5):
        write(ring, f"at {at}", at)
    out = io.StringIO()
    drain = Drain(out)
    drain.add([ring])
    drain.start()
    drain.stop()
    assert f"[Warning] [Test] 3 records dropped: the ring /dev/shm/{ring.segment.name} was full" in out.getvalue()


class FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_sink_that_fails_is_counted_and_the_ring_still_emptied(make_ring: MakeRing) -> None:
    ring = make_ring(4)
    drain = Drain(FullDisk())
    drain.add([ring])
    drain.start()
    deadline_s = time.monotonic() + 10
    written = 0
    while written < 20:
        written += ring.write(LogEntry(Severity.Info, Facility.Test, "x"))
        assert time.monotonic() < deadline_s
    drain.stop()
    assert drain.lines_lost >= 20


def test_a_removed_ring_is_written_out_first(make_ring: MakeRing) -> None:
    ring, out = make_ring(), io.StringIO()
    drain = Drain(out)
    drain.add([ring])
    write(ring, "before")
    drain.remove([ring])
    write(ring, "after")
    drain.start()
    drain.stop()
    assert out.getvalue() == "[Info] [Test] before\n"


def test_mcrlog_lists_and_dumps_rings_without_taking_from_them(make_ring: MakeRing) -> None:
    ring = make_ring()
    write(ring, "hello", time.monotonic_ns())
    listed = json.loads(CliRunner().invoke(main, ["list", "--json"]).output)
    (mine,) = [entry for entry in listed if entry["segment"] == ring.segment.name]
    assert (mine["alive"], mine["written"], mine["unread"]) == (True, 1, 1)
    assert ring.segment.name in CliRunner().invoke(main, ["list"]).output
    dumped = CliRunner().invoke(main, ["dump", ring.segment.name])
    assert dumped.output.endswith("[Info] [Test] hello\n")
    assert ring.read() is not None


@pytest.mark.parametrize("segment", ["nothing", "mcr_nothing"])
def test_mcrlog_names_a_ring_that_is_not_there(segment: str) -> None:
    result = CliRunner().invoke(main, ["dump", segment])
    assert result.exit_code == 1
    assert segment in result.output
