"""The drain: every ring is read and handed to every sink; no sink, no ring and no dead writer stops it."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from logging_shm import Drain, Facility, Severity, SharedSPSCRingBuffer
from logging_shm.drain import BUSY_RECORDS
from logging_shm.layout import HEADER, LIMIT, RECORD_BYTES, RECORDS_OFFSET, STATE_READY, STATE_WRITING
from logging_shm.lines import Batch
from logging_shm.sinks.base import Chunk, Sink, messages
from logging_shm.sinks.selection import Selection
from tests.logging_shm.reading import MAX_I64, MIN_I64, MakeRing, until, write


class Kept(Sink):
    """Keeps its lines."""

    def __init__(self, name: str = "kept", **selection: Any) -> None:
        super().__init__(name, "text", Selection(**selection))
        self.lines: list[str] = []

    def deliver(self, chunk: Chunk) -> None:
        self.lines += [line.decode().rstrip("\n") for line in messages(chunk)]
        self.advance(len(chunk.ends))

    def close_target(self) -> None:
        pass

    def wait_for(self, line: str) -> None:
        until(lambda: line in self.lines, f"{line!r}, only {self.lines}")


class Refilling(Kept):
    """Fills a ring up again as it is read: every pass finds it busy."""

    def __init__(self, ring: SharedSPSCRingBuffer) -> None:
        super().__init__("refilling")
        self._ring = ring
        self.passes = 0

    def accept(self, batch: Batch) -> None:
        self.passes += 1
        while self._ring.unread() < 2 * BUSY_RECORDS:
            write(self._ring, "flood", 1)


class Stuck(Kept):
    """Delivers nothing until it is let go."""

    def __init__(self) -> None:
        super().__init__("stuck")
        self.entered, self.let_go = threading.Event(), threading.Event()

    def deliver(self, chunk: Chunk) -> None:
        if chunk.data:
            self.entered.set()
        self.let_go.wait()
        super().deliver(chunk)


class Failing(Kept):
    """Its target is always full."""

    def deliver(self, chunk: Chunk) -> None:
        raise OSError(28, "No space left on device")


class Raising(Kept):
    """Goes wrong while it formats, in the drain's thread."""

    def accept(self, batch: Batch) -> None:
        raise RuntimeError("went wrong")


@pytest.fixture
def start() -> Iterator[Callable[..., Drain]]:
    """Start a drain, which is stopped at the latest after the test."""
    running: list[Drain] = []

    def start(*sinks: Sink, rings: list[SharedSPSCRingBuffer] | None = None, follow: str | None = None) -> Drain:
        drain = Drain(sinks, follow)
        drain.add(rings or [])
        drain.start()
        running.append(drain)
        return drain

    yield start
    for drain in running:
        drain.stop()


def said(*words: str) -> list[str]:
    return [f"[Info] [Test] {word}" for word in words]


def exists(name: str) -> bool:
    return Path("/dev/shm", name).exists()


# --- rings and sinks ------------------------------------------------------------------------------


def test_every_sink_gets_the_records_of_every_ring_in_order_of_time(
    make_ring: MakeRing, start: Callable[..., Drain]
) -> None:
    rings, sinks = [make_ring(), make_ring()], [Kept(), Kept()]
    for at in range(6):
        write(rings[at % 2], f"at {at}", at)
    start(*sinks, rings=rings)
    for sink in sinks:
        sink.wait_for(*said("at 5"))
        assert sink.lines == said(*(f"at {at}" for at in range(6)))


def test_each_sink_gets_the_levels_and_facilities_that_it_wants(
    make_ring: MakeRing, start: Callable[..., Drain]
) -> None:
    grave = Kept(level=Severity.Error)
    egress = Kept(facilities=frozenset({Facility.Egress}))
    everything = Kept()
    ingress_ring, egress_ring = make_ring(facility=Facility.Ingress), make_ring(facility=Facility.Egress)
    write(ingress_ring, "in", 1, Severity.Error)
    write(ingress_ring, "in", 2, Severity.Debug)
    write(egress_ring, "out", 3, Severity.Info)
    start(grave, egress, everything, rings=[ingress_ring, egress_ring]).stop()
    assert grave.lines == ["[Error] [Ingress] in"]
    assert egress.lines == ["[Info] [Egress] out"]
    assert everything.lines == ["[Error] [Ingress] in", "[Debug] [Ingress] in", "[Info] [Egress] out"]


def test_a_ring_that_is_added_while_it_runs_is_read(make_ring: MakeRing, start: Callable[..., Drain]) -> None:
    first, second, sink = make_ring(), make_ring(), Kept()
    drain = start(sink, rings=[first])
    write(first, "first")
    sink.wait_for(*said("first"))
    drain.add([second])
    write(second, "second")
    write(first, "first again")
    sink.wait_for(*said("second"))
    sink.wait_for(*said("first again"))
    assert sorted(sink.lines) == sorted(said("first", "second", "first again"))


def test_a_removed_ring_is_handed_on_first_and_then_left_alone(
    make_ring: MakeRing, start: Callable[..., Drain]
) -> None:
    removed, kept, sink = make_ring(), make_ring(), Kept()
    drain = start(sink, rings=[removed, kept])
    write(removed, "before")
    drain.remove([removed])
    write(removed, "after")
    write(kept, "kept")
    drain.stop()
    assert sink.lines == said("before", "kept")
    assert removed.unread() == 1


def test_stopping_hands_on_everything(make_ring: MakeRing, start: Callable[..., Drain]) -> None:
    rings, sink = [make_ring(8192), make_ring(8192)], Kept()
    drain = start(sink, rings=rings)
    for at in range(10_000):
        write(rings[at % 2], str(at))
    drain.stop()
    assert sorted(sink.lines) == sorted(said(*map(str, range(10_000))))


def test_stopping_tells_what_was_dropped(make_ring: MakeRing) -> None:
    ring, sink = make_ring(2), Kept()
    drain = Drain([sink])
    drain.add([ring])
    for number in range(5):
        write(ring, str(number))
    drain.start()
    drain.stop()
    assert sink.lines[:2] == said("0", "1")
    (warning,) = sink.lines[2:]
    assert warning.startswith("[Warning] [Test] 3 records dropped in ")
    assert warning.endswith(f" ms, {ring.segment.name} was full: 3 Info")


def test_two_drains_read_their_own_rings_at_the_same_time(make_ring: MakeRing, start: Callable[..., Drain]) -> None:
    rings, sinks = [make_ring(1024), make_ring(1024)], [Kept(), Kept()]
    drains = [start(sink, rings=[ring]) for ring, sink in zip(rings, sinks, strict=True)]
    for number in range(1000):
        write(rings[0], f"first {number}")
        write(rings[1], f"second {number}")
    for drain in drains:
        drain.stop()
    assert sinks[0].lines == said(*(f"first {number}" for number in range(1000)))
    assert sinks[1].lines == said(*(f"second {number}" for number in range(1000)))


def test_a_second_drain_goes_on_where_the_first_stopped(make_ring: MakeRing, start: Callable[..., Drain]) -> None:
    ring, first, second = make_ring(), Kept(), Kept()
    write(ring, "first")
    start(first, rings=[ring]).stop()
    write(ring, "second")
    start(second, rings=[ring]).stop()
    assert (first.lines, second.lines) == (said("first"), said("second"))


# --- sinks that go wrong --------------------------------------------------------------------------


def write_in_turn(ring: SharedSPSCRingBuffer, sink: Kept, count: int) -> None:
    """More than a ring holds, each line once the one before has arrived."""
    for number in range(count):
        assert write(ring, str(number))
        sink.wait_for(*said(str(number)))


def test_a_sink_that_blocks_delays_no_other_sink_and_no_reading(
    make_ring: MakeRing, start: Callable[..., Drain]
) -> None:
    ring, stuck, sound = make_ring(2), Stuck(), Kept()
    drain = start(stuck, sound, rings=[ring])
    write_in_turn(ring, sound, 20)
    assert stuck.entered.is_set()
    assert stuck.lines == []
    stuck.let_go.set()
    drain.stop()
    assert stuck.lines == sound.lines == said(*map(str, range(20)))


def test_a_sink_that_fails_delays_no_other_sink_and_is_told_to_it(
    make_ring: MakeRing, start: Callable[..., Drain]
) -> None:
    ring, sound = make_ring(2), Kept()
    start(Failing("full disk"), sound, rings=[ring])
    write_in_turn(ring, sound, 20)
    notice = "[Error] [Test] Log sink full disk: No space left on device: lines wait, then are lost"
    sound.wait_for(notice)
    assert [line for line in sound.lines if line != notice] == said(*map(str, range(20)))


def test_a_sink_that_raises_is_told_once_and_left_out(make_ring: MakeRing, start: Callable[..., Drain]) -> None:
    ring, sound = make_ring(2), Kept()
    start(Raising("mistaken"), sound, rings=[ring])
    write_in_turn(ring, sound, 20)
    notice = "[Error] [Test] Log sink mistaken: RuntimeError: went wrong: it gets no more lines"
    sound.wait_for(notice)
    assert sound.lines.count(notice) == 1
    assert [line for line in sound.lines if line != notice] == said(*map(str, range(20)))


# --- rings that are found by name -----------------------------------------------------------------

MAKE_A_RING = """
import sys
from logging_shm import Logger, SharedSPSCRingBuffer
ring = SharedSPSCRingBuffer.create(sys.argv[1], 8)
Logger(ring).info(sys.argv[2])
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def program() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Run a program that makes a ring, writes a line and lives until it is killed."""
    running: list[subprocess.Popen[str]] = []

    def run(name: str, message: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", MAKE_A_RING, name, message],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        running.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield run
    for process in running:
        kill(process)


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


@pytest.fixture
def prefix(name: str) -> Iterator[str]:
    """What the names of a test's rings begin with."""
    yield f"{name}_"
    for path in Path("/dev/shm").glob(f"{name}_*"):
        path.unlink()


def begin_next_record(name: str, state: int, message: bytes) -> None:
    """Leave the ring as a writer does that is killed before it counts its second record."""
    ring = SharedSPSCRingBuffer.attach(name)
    at = RECORDS_OFFSET + RECORD_BYTES
    first = bytearray(ring.segment.memory[RECORDS_OFFSET:at])
    first[0], first[3], first[16] = state, len(message), 1
    first[32 : 32 + len(message)] = message
    ring.segment.memory[at : at + RECORD_BYTES] = bytes(first)


def test_rings_that_were_there_and_rings_that_come_later_are_followed(
    prefix: str, program: Callable[..., Any], start: Callable[..., Drain]
) -> None:
    sink = Kept()
    program(f"{prefix}early", "early")
    start(sink, follow=prefix)
    sink.wait_for(*said("early"))
    program(f"{prefix}late", "late")
    sink.wait_for(*said("late"))
    assert sorted(sink.lines) == sorted(said("early", "late"))


def test_rings_of_other_names_are_not_followed(
    prefix: str, name: str, make_ring: MakeRing, start: Callable[..., Drain]
) -> None:
    sink = Kept()
    other = SharedSPSCRingBuffer.create(f"{name}.other", 8)
    with other, SharedSPSCRingBuffer.create(f"{prefix}one", 8) as followed:
        write(other, "other")
        write(followed, "followed")
        start(sink, follow=prefix).stop()
        assert sink.lines == said("followed")
        assert other.unread() == 1


def test_what_is_no_ring_is_not_followed_and_stays(prefix: str, start: Callable[..., Drain]) -> None:
    junk = Path("/dev/shm", f"{prefix}junk")
    junk.write_bytes(b"x" * 100)
    sink = Kept()
    with SharedSPSCRingBuffer.create(f"{prefix}ring", 8) as ring:
        write(ring, "sound")
        start(sink, follow=prefix).stop()
    assert sink.lines == said("sound")
    assert junk.read_bytes() == b"x" * 100


def test_a_ring_whose_owner_died_is_read_to_its_end_and_unlinked(
    prefix: str, program: Callable[..., Any], start: Callable[..., Drain]
) -> None:
    sink = Kept()
    kill(program(f"{prefix}dead", "last words"))
    start(sink, follow=prefix)
    until(lambda: not exists(f"{prefix}dead"), "the ring is unlinked")
    sink.wait_for(*said("last words"))
    assert sink.lines == said("last words")


def test_a_ring_whose_owner_lives_is_not_unlinked(
    prefix: str, program: Callable[..., Any], start: Callable[..., Drain]
) -> None:
    program(f"{prefix}alive", "alive")
    sink = Kept()
    start(sink, follow=prefix).stop()
    assert sink.lines == said("alive")
    assert exists(f"{prefix}alive")


def test_stopping_reads_and_unlinks_rings_that_nobody_found_yet(
    prefix: str, program: Callable[..., Any], start: Callable[..., Drain]
) -> None:
    sink = Kept()
    drain = start(sink, follow=prefix)
    kill(program(f"{prefix}dead", "last words"))
    drain.stop()
    assert sink.lines == said("last words")
    assert not exists(f"{prefix}dead")


@pytest.mark.parametrize("stopping", [False, True])
def test_the_record_that_a_followed_writer_had_finished_when_it_was_killed_is_read(
    prefix: str, program: Callable[..., Any], start: Callable[..., Drain], stopping: bool
) -> None:
    sink, ring = Kept(), f"{prefix}killed"
    process = program(ring, "first")
    drain = start(sink, follow=prefix)
    sink.wait_for(*said("first"))
    begin_next_record(ring, STATE_READY, b"not counted")
    kill(process)
    if stopping:
        drain.stop()
    until(lambda: not exists(ring), "the ring is unlinked")
    sink.wait_for(*said("not counted"))
    assert sink.lines == said("first", "not counted")


@pytest.mark.parametrize("stopping", [False, True])
def test_a_followed_writer_that_was_killed_in_the_middle_of_a_record_is_told(
    prefix: str, program: Callable[..., Any], start: Callable[..., Drain], stopping: bool
) -> None:
    sink, ring = Kept(), f"{prefix}killed"
    process = program(ring, "first")
    drain = start(sink, follow=prefix)
    sink.wait_for(*said("first"))
    begin_next_record(ring, STATE_WRITING, b"half")
    kill(process)
    if stopping:
        drain.stop()
    until(lambda: not exists(ring), "the ring is unlinked")
    sink.wait_for(f"[Warning] [Test] A writer of {ring} was killed in the middle of a record, which is lost")


def test_what_was_suppressed_just_before_a_followed_writer_died_is_told(
    prefix: str, program: Callable[..., Any], start: Callable[..., Drain]
) -> None:
    sink, name = Kept(), f"{prefix}killed"
    process = program(name, "first")
    start(sink, follow=prefix)
    sink.wait_for(*said("first"))
    ring = SharedSPSCRingBuffer.attach(name)
    LIMIT.set(memoryview(ring.segment.memory)[HEADER["limits"] :], "suppressed", 5)
    kill(process)
    until(lambda: not exists(name), "the ring is unlinked")
    sink.wait_for("[Warning] [Test] 5 records suppressed by their rate limit: text")


@pytest.mark.parametrize(
    "header",
    [
        {"unfinished": MAX_I64},
        {"capacity": MAX_I64, "write_cursor": 1 << 40},
        {"capacity": 0, "write_cursor": MIN_I64},
        {"write_cursor": MAX_I64, "read_cursor": MIN_I64},
    ],
)
def test_a_dead_ring_with_a_damaged_header_stops_nothing(
    prefix: str, program: Callable[..., Any], start: Callable[..., Drain], header: dict[str, int]
) -> None:
    sink, name = Kept(), f"{prefix}damaged"
    process = program(name, "first")
    start(sink, follow=prefix)
    sink.wait_for(*said("first"))
    begin_next_record(name, STATE_WRITING, b"half")
    ring = SharedSPSCRingBuffer.attach(name)
    for field, value in header.items():
        ring.segment.set(field, value)
    kill(process)
    until(lambda: not exists(name), "the ring is unlinked")
    program(f"{prefix}sound", "sound")
    sink.wait_for(*said("sound"))


def test_a_dead_ring_s_name_may_be_taken_again_before_it_is_forgotten(
    prefix: str, program: Callable[..., Any], start: Callable[..., Drain]
) -> None:
    sink, name = Kept(), f"{prefix}again"
    process = program(name, "first")
    drain = start(sink, follow=prefix)
    sink.wait_for(*said("first"))
    kill(process)
    with SharedSPSCRingBuffer.create(name, 8) as successor:
        write(successor, "second")
        sink.wait_for(*said("second"))
        drain.stop()
        assert sink.lines == said("first", "second")
        assert exists(name)


def test_rings_are_found_while_others_are_busy(prefix: str, make_ring: MakeRing, start: Callable[..., Drain]) -> None:
    busy, sink = make_ring(1024), Kept(level=Severity.Notice)
    refilling = Refilling(busy)
    write(busy, "flood", 1)
    start(refilling, sink, rings=[busy], follow=prefix)
    until(lambda: refilling.passes > 10, "the drain is busy")
    with SharedSPSCRingBuffer.create(f"{prefix}late", 8) as late:
        write(late, "late", severity=Severity.Notice)
        sink.wait_for("[Notice] [Test] late")


def test_stopping_ends_while_a_ring_is_busy(make_ring: MakeRing, start: Callable[..., Drain]) -> None:
    busy, quiet, sink = make_ring(1024), make_ring(), Kept(level=Severity.Notice)
    write(busy, "flood", 1)
    drain = start(Refilling(busy), sink, rings=[busy, quiet])
    write(quiet, "quiet", 2, Severity.Notice)
    drain.stop()
    assert sink.lines == ["[Notice] [Test] quiet"]


def test_a_drain_leaves_no_thread_behind(make_ring: MakeRing, start: Callable[..., Drain]) -> None:
    before = set(threading.enumerate())
    drain = start(Kept(), Failing("full disk"), rings=[make_ring()])
    assert len(set(threading.enumerate()) - before) == 3
    drain.stop()
    until(lambda: set(threading.enumerate()) <= before, "threads end")
