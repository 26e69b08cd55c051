"""The ring: what is written is read, from Python and from compiled code; a full ring drops and counts."""

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from logging_shm import Facility, LogEntry, Logger, SegmentError, Severity, SharedSPSCRingBuffer
from logging_shm.compiled import write_event, write_event_about, write_text
from logging_shm.layout import MESSAGE_BYTES_MAX, pair_key
from tests.logging_shm.conftest import MakeRing

EVENT = 1
INFO = int(Severity.Info)
KEY_RULE = pair_key("rule")
FORMATS = {EVENT: "First packet of rule {rule} from {0:ip}:{1:port}", 2: "{0:d} {1:g} {2:dur} {3:hex}"}
SHARED_FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
CAPACITY = 8
TV = np.frombuffer(b"tv", np.uint8)


def entry(message: str, severity: Severity = Severity.Info, **fields: Any) -> LogEntry:
    return LogEntry(severity=severity, facility=Facility.Test, message=message, **fields)


def messages(ring: SharedSPSCRingBuffer) -> list[str]:
    """Everything that is in the ring, taken out."""
    return [read.message for _ in range(ring.capacity + 1) if (read := ring.read())]


# --- what is written is read ------------------------------------------------------------------------


@given(message=st.text(max_size=300), value=st.text(max_size=40))
@SHARED_FIXTURE
def test_text_is_read_as_written_cut_to_its_room_and_printable(make_ring: MakeRing, message: str, value: str) -> None:
    ring = make_ring()
    assert ring.write(entry(message, pairs=(("key", value),)))
    read = ring.read()
    assert read is not None
    assert read.message.isprintable()
    if message.isprintable() and len(message.encode()) <= MESSAGE_BYTES_MAX and max(message, default="") < "\U00020000":
        assert read.message == message
    assert ring.read() is None
    ring.shutdown()


def test_a_long_message_is_cut_between_characters_and_marked(make_ring: MakeRing) -> None:
    ring = make_ring()
    ring.write(entry("é" * 200))
    read = ring.read()
    assert read is not None
    assert read.message.endswith("é…")
    assert len(read.message.encode()) <= MESSAGE_BYTES_MAX


def test_a_message_that_just_fits_is_not_cut(make_ring: MakeRing) -> None:
    ring = make_ring()
    ring.write(entry("x" * MESSAGE_BYTES_MAX))
    assert messages(ring) == ["x" * MESSAGE_BYTES_MAX]


def test_pairs_beyond_their_number_and_room_are_cut(make_ring: MakeRing) -> None:
    ring = make_ring()
    Logger(ring).info("x", first="a" * 30, much_too_long_a_key="b", third="c")
    read = ring.read()
    assert read is not None
    assert read.pairs == (("first", "a" * 20), ("much_too", "b"))


def test_typed_arguments_are_rendered_by_whoever_reads(make_ring: MakeRing) -> None:
    ring = make_ring(formats=FORMATS)
    assert write_event_about(ring.segment.bytes, INFO, EVENT, 55, (0x0A000007, 5001), KEY_RULE, TV, 2)
    assert write_event(ring.segment.bytes, INFO, 2, 56, (-5, 2.5, 1_500_000, 255))
    other = SharedSPSCRingBuffer.attach(ring.segment.name)
    read = other.read()
    assert read is not None
    assert read.message == "First packet of rule tv from 10.0.0.7:5001"
    assert (read.timestamp_ns, read.severity, read.pairs) == (55, Severity.Info, (("rule", "tv"),))
    assert messages(other) == ["-5 2.5 1.500 ms 0xff"]


def test_more_arguments_than_a_record_holds_do_not_compile(make_ring: MakeRing) -> None:
    with pytest.raises(Exception, match="9 arguments: a record holds at most 8"):
        write_event(make_ring().segment.bytes, INFO, 1, 0, (1, 2, 3, 4, 5, 6, 7, 8, 9))


def test_text_from_compiled_code_reads_like_text_from_python(make_ring: MakeRing) -> None:
    ring = make_ring()
    text = np.frombuffer(b"from compiled code", np.uint8)
    assert write_text(ring.segment.bytes, INFO, 0, text, len(text))
    read = ring.read()
    assert read is not None
    assert read.message == "from compiled code"
    assert read.timestamp_ns > 0
    assert (read.process, read.thread) == (os.getpid(), os.getpid())


def test_an_unregistered_format_is_told_and_harms_nothing(make_ring: MakeRing) -> None:
    ring = make_ring()
    write_event(ring.segment.bytes, INFO, 31, 0, (1,))
    assert messages(ring) == ["(format 31 is not registered)"]


@pytest.mark.parametrize(("number", "text"), [(0, "x"), (32, "x"), (1, ""), (1, "x" * 129)])
def test_a_format_that_can_not_be_is_refused(make_ring: MakeRing, number: int, text: str) -> None:
    with pytest.raises(ValueError, match=f"format {number}"):
        make_ring(formats={number: text})


# --- levels, limits, a full ring --------------------------------------------------------------------


def test_levels_filter_in_python_and_in_compiled_code(make_ring: MakeRing) -> None:
    ring = make_ring()
    ring.segment.level = Severity.Warning
    assert ring.segment.level is Severity.Warning
    for severity in Severity:
        wanted = severity <= Severity.Warning
        assert ring.write(entry("x", severity)) == wanted
        assert write_event(ring.segment.bytes, int(severity), 1, 0, (1,)) == wanted
        assert write_text(ring.segment.bytes, int(severity), 0, TV, 2) == wanted
        assert write_event_about(ring.segment.bytes, int(severity), 1, 0, (1,), KEY_RULE, TV, 2) == wanted
        while ring.read():
            pass


def test_a_full_ring_drops_the_new_record_and_counts_by_severity(make_ring: MakeRing) -> None:
    ring = make_ring(4)
    assert [ring.write(entry(str(i))) for i in range(6)] == [True] * 4 + [False] * 2
    assert not write_event(ring.segment.bytes, int(Severity.Error), 1, 0, (1,))
    assert ring.segment.dropped() == [0, 0, 0, 1, 0, 0, 2, 0]
    assert ring.dropped() == 3
    assert ring.dropped() == 0
    assert messages(ring) == ["0", "1", "2", "3"]
    assert ring.write(entry("again"))


def test_an_overwriting_ring_keeps_the_newest_and_the_reader_counts_what_it_missed(make_ring: MakeRing) -> None:
    ring = make_ring(4, overwrite=True)
    assert all(ring.write(entry(str(i))) for i in range(7))
    assert messages(ring) == ["3", "4", "5", "6"]
    assert ring.missed == 3
    assert sum(ring.segment.dropped()) == 0


def write_from_python(ring: SharedSPSCRingBuffer, timestamp_ns: int) -> bool:
    return ring.append(INFO, "x", timestamp_ns=timestamp_ns)


def write_from_compiled_code(ring: SharedSPSCRingBuffer, timestamp_ns: int) -> bool:
    return bool(write_text(ring.segment.bytes, INFO, timestamp_ns, TV, 2))


@pytest.mark.parametrize("write", [write_from_python, write_from_compiled_code])
def test_a_rate_limit_lets_a_burst_pass_then_one_each_interval(
    make_ring: MakeRing, write: Callable[[SharedSPSCRingBuffer, int], bool]
) -> None:
    ring = make_ring(64)
    ring.segment.limit(0, per_second=10, burst=3)
    second = 1_000_000_000
    assert [write(ring, second) for _ in range(5)] == [True, True, True, False, False]
    assert not write(ring, second + 99_000_000)
    assert write(ring, second + 100_000_000)
    assert not write(ring, second + 100_000_000)
    assert [write(ring, 3 * second) for _ in range(4)] == [True, True, True, False]
    assert ring.segment.suppressed(0) == 5


def test_a_limit_holds_for_its_event_alone_and_can_be_lifted(make_ring: MakeRing) -> None:
    ring = make_ring(64, formats=FORMATS)
    ring.segment.limit(EVENT, per_second=1)
    assert [bool(write_event(ring.segment.bytes, INFO, EVENT, 5, (1, 2))) for _ in range(2)] == [True, False]
    assert all(write_event(ring.segment.bytes, INFO, 2, 5, (1, 2.0, 3, 4)) for _ in range(3))
    ring.segment.limit(EVENT, per_second=0)
    assert write_event(ring.segment.bytes, INFO, EVENT, 5, (1, 2))


class RingModel(RuleBasedStateMachine):
    """A ring beside a list: the same writes and reads, by Python and by compiled code, give the same."""

    overwrite = False

    def __init__(self) -> None:
        super().__init__()
        name = f"mcr_model{os.getpid()}"
        self.ring = SharedSPSCRingBuffer.create(name, CAPACITY, formats={1: "{0:d}"}, overwrite=self.overwrite)
        self.waiting: list[tuple[int, str]] = []
        self.dropped = [0] * 8
        self.missed = 0
        self.number = 0
        self.level = int(Severity.Debug)

    def expect(self, severity: int, written: bool) -> None:
        text = str(self.number)
        if severity > self.level:
            assert not written
            return
        if len(self.waiting) < CAPACITY or self.overwrite:
            assert written
            self.waiting.append((severity, text))
        else:
            assert not written
            self.dropped[severity] += 1
        if len(self.waiting) > CAPACITY:
            self.waiting.pop(0)
            self.missed += 1

    @rule(severity=st.sampled_from(Severity))
    def write_from_python(self, severity: Severity) -> None:
        self.number += 1
        self.expect(severity, self.ring.append(int(severity), str(self.number)))

    @rule(severity=st.sampled_from(Severity), typed=st.booleans())
    def write_from_compiled_code(self, severity: Severity, typed: bool) -> None:
        self.number += 1
        text = np.frombuffer(str(self.number).encode(), np.uint8)
        segment = self.ring.segment.bytes
        written = (
            write_event(segment, int(severity), 1, 0, (self.number,))
            if typed
            else write_text(segment, int(severity), 0, text, len(text))
        )
        self.expect(severity, bool(written))

    @rule(level=st.sampled_from(Severity))
    def set_level(self, level: Severity) -> None:
        self.ring.segment.level = level
        self.level = level

    @precondition(lambda self: self.waiting)
    @rule(count=st.integers(1, CAPACITY))
    def read(self, count: int) -> None:
        for _ in range(min(count, len(self.waiting))):
            read = self.ring.read()
            assert read is not None
            assert (read.severity, read.message) == self.waiting.pop(0)
        assert self.ring.missed == self.missed

    @precondition(lambda self: not self.waiting)
    @rule()
    def read_nothing(self) -> None:
        assert self.ring.read() is None

    @invariant()
    def counts_agree(self) -> None:
        assert self.ring.segment.dropped() == self.dropped
        assert self.ring.unread() == len(self.waiting)
        assert [read.message for read in self.ring.last(CAPACITY)][-len(self.waiting) or CAPACITY :] == [
            text for _, text in self.waiting
        ]

    def teardown(self) -> None:
        self.ring.shutdown()


class OverwritingRingModel(RingModel):
    overwrite = True


TestDroppingRing = RingModel.TestCase
TestOverwritingRing = OverwritingRingModel.TestCase


# --- the reader trusts nothing ----------------------------------------------------------------------


@given(raw=st.binary(min_size=256, max_size=256))
@SHARED_FIXTURE
def test_no_bytes_in_a_record_can_crash_or_forge(make_ring: MakeRing, raw: bytes) -> None:
    ring = make_ring(formats=FORMATS)
    read = ring.decode(raw)
    assert read.message.isprintable()
    assert all(key.isprintable() and value.isprintable() for key, value in read.pairs)
    ring.shutdown()


@given(written=st.integers(-(1 << 63), (1 << 63) - 1), cursor=st.integers(-(1 << 63), (1 << 63) - 1))
@SHARED_FIXTURE
def test_no_cursors_can_crash_the_reader_or_make_it_run_away(make_ring: MakeRing, written: int, cursor: int) -> None:
    ring = make_ring(4)
    ring.segment.set("write_cursor", written)
    ring.segment.set("read_cursor", cursor)
    read = 0
    while ring.read() is not None:
        read += 1
        assert read <= 4
    assert ring.last(4) == []
    ring.shutdown()


def test_drained_records_stay_readable_until_overwritten(make_ring: MakeRing) -> None:
    ring = make_ring(4)
    for i in range(6):
        ring.write(entry(str(i)))
        ring.read()
    assert [e.message for e in ring.last(10)] == ["2", "3", "4", "5"]
    assert [e.message for e in ring.last(2)] == ["4", "5"]


# --- threads, tasks, processes ----------------------------------------------------------------------


def test_several_threads_share_a_logger(make_ring: MakeRing) -> None:
    ring = make_ring(4096)
    logger = Logger(ring)
    threads = [threading.Thread(target=lambda n=n: [logger.info(f"{n}") for _ in range(500)]) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entries = [e for _ in range(4096) if (e := ring.read())]
    assert sorted(e.message for e in entries) == sorted(str(n) for n in range(4) for _ in range(500))
    assert [e.sequence for e in entries] == list(range(2000))
    assert len({(e.message, e.thread) for e in entries}) == 4


def test_several_tasks_share_a_logger(make_ring: MakeRing) -> None:
    ring = make_ring(64)
    logger = Logger(ring)

    async def work(name: str) -> None:
        for _ in range(5):
            logger.info(name)
            await asyncio.sleep(0)

    async def all_of_them() -> None:
        await asyncio.gather(work("a"), work("b"))

    asyncio.run(all_of_them())
    assert messages(ring) == ["a", "b"] * 5


def test_a_forked_process_writes_under_its_own_pid(make_ring: MakeRing) -> None:
    ring = make_ring()
    Logger(ring).info("parent")
    pid = os.fork()
    if pid == 0:
        Logger(ring).info("child")
        os._exit(0)
    os.waitpid(pid, 0)
    parent, child = ring.read(), ring.read()
    assert parent is not None
    assert child is not None
    assert (parent.process, child.process, child.thread) == (os.getpid(), pid, pid)


def test_records_of_a_killed_writer_are_still_there_and_its_name_can_be_taken_again(name: str) -> None:
    pid = os.fork()
    if pid == 0:
        ring = SharedSPSCRingBuffer.create(name, 8)
        ring.write(entry("last words"))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert [e.message for e in SharedSPSCRingBuffer.attach(name).last(5)] == ["last words"]
    with SharedSPSCRingBuffer.create(name, 8) as ring:
        assert ring.read() is None


def test_a_segment_of_somebody_else_is_refused_by_whoever_says_whom_it_trusts(make_ring: MakeRing) -> None:
    ring = make_ring(uid=12345)
    with pytest.raises(SegmentError, match="belongs to user id 12345, not to"):
        SharedSPSCRingBuffer.attach(ring.segment.name, owners={os.geteuid()})
    SharedSPSCRingBuffer.attach(ring.segment.name, owners={os.geteuid(), 12345})
    SharedSPSCRingBuffer.attach(ring.segment.name)
