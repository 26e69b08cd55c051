"""The reader: rings merged by time, losses told once, and no ring that stops, crashes or starves the others."""

import os
import re
import signal
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numba import njit

from logging_shm import Facility, LogEntry, Reader, Severity, SharedSPSCRingBuffer
from logging_shm.compiled import write_event, write_event_about
from logging_shm.layout import FORMATS_MAX, HEADER, RECORD_BYTES, STATE_EMPTY, STATE_WRITING, pair_key
from logging_shm.lines import FORMATTERS
from logging_shm.reader import BATCH_RECORDS, REPORTS_MAX
from tests.logging_shm.reading import (
    MAX_I64,
    MIN_I64,
    SHARED_FIXTURE,
    MakeRing,
    int64s,
    lines,
    put,
    read,
    record,
    record_at,
    until,
    write,
)

HOUR_NS = 3_600_000_000_000
RULE_KEY = pair_key("rule")
FOREVER = 1 << 60


def reading(*rings: SharedSPSCRingBuffer, **options: Any) -> Reader:
    reader = Reader(**options)
    reader.add(rings)
    return reader


# --- order ----------------------------------------------------------------------------------------


def test_records_of_several_rings_come_in_the_order_of_their_time(make_ring: MakeRing) -> None:
    rings = [make_ring(16) for _ in range(3)]
    for at in range(30):
        write(rings[at % 3], f"at {at}", at)
    assert read(reading(*rings)) == [f"at {at}" for at in range(30)]


@given(st.lists(st.tuples(st.integers(0, 3), int64s), max_size=40))
@settings(SHARED_FIXTURE)
def test_any_times_are_merged_as_a_sort_merges_them(make_ring: MakeRing, written: list[tuple[int, int]]) -> None:
    rings = [make_ring(64) for _ in range(4)]
    queues: list[list[int]] = [[], [], [], []]
    for index, timestamp_ns in written:
        write(rings[index], "", timestamp_ns)
        queues[index].append(timestamp_ns)
    batch = reading(*rings).read(everything=True)
    expected = []
    while any(queues):
        first = min((queue for queue in queues if queue), key=lambda queue: queue[0])
        expected.append(first.pop(0))
    assert batch.records[:, 8:16].copy().view(np.int64).ravel().tolist() == expected
    for ring in rings:
        ring.shutdown()


def test_records_of_the_same_time_come_ring_by_ring(make_ring: MakeRing) -> None:
    first, second = make_ring(), make_ring()
    for number in range(3):
        write(second, f"second {number}", 7)
        write(first, f"first {number}", 7)
    assert read(reading(first, second)) == [f"{ring} {n}" for ring in ("first", "second") for n in range(3)]


def test_young_records_wait_for_older_ones_of_other_rings(make_ring: MakeRing) -> None:
    slow, quick = make_ring(), make_ring()
    reader = reading(slow, quick, delay_ns=HOUR_NS)
    now_ns = time.monotonic_ns()
    write(quick, "young", now_ns)
    assert read(reader, everything=False) == []
    write(slow, "older but late", now_ns - 1)
    write(slow, "old enough", now_ns)
    assert read(reader, everything=False) == []
    assert read(reader) == ["older but late", "old enough", "young"]


def test_old_records_do_not_wait(make_ring: MakeRing) -> None:
    first, second = make_ring(), make_ring()
    reader = reading(first, second, delay_ns=HOUR_NS)
    now_ns = time.monotonic_ns()
    write(first, "old", now_ns - 3 * HOUR_NS)
    write(first, "young", now_ns)
    write(second, "older", now_ns - 4 * HOUR_NS)
    assert read(reader, everything=False) == ["older", "old"]


def test_a_record_that_is_written_while_the_reader_begins_waits_like_all_young_ones(make_ring: MakeRing) -> None:
    ring = make_ring()
    reader = reading(ring, delay_ns=HOUR_NS)
    write(ring, "a moment after the reader looked at the clock", time.monotonic_ns() + 500_000_000)
    assert read(reader, everything=False) == []
    assert len(read(reader)) == 1


@pytest.mark.parametrize("timestamp_ns", [MAX_I64, MAX_I64 - 1, 1 << 62])
def test_a_time_in_the_far_future_does_not_hold_its_ring_up(make_ring: MakeRing, timestamp_ns: int) -> None:
    damaged, sound = make_ring(), make_ring()
    write(damaged, "from the future", timestamp_ns)
    write(damaged, "behind it", 1)
    write(sound, "sound", 2)
    assert read(reading(damaged, sound), everything=False) == ["sound", "from the future", "behind it"]


def test_a_ring_that_is_refilled_with_old_records_does_not_starve_others(make_ring: MakeRing) -> None:
    flooded, quiet = make_ring(2 * BATCH_RECORDS), make_ring()
    reader = reading(flooded, quiet)
    write(quiet, "quiet", 2)
    heard: list[str] = []
    for _ in range(8):
        while write(flooded, "flood", 1):
            pass
        heard += read(reader, everything=False)
    assert "quiet" in heard


def test_a_backlog_of_many_batches_is_read_in_order(make_ring: MakeRing) -> None:
    rings = [make_ring(2 * BATCH_RECORDS) for _ in range(2)]
    for at in range(4 * BATCH_RECORDS):
        write(rings[at % 2], str(at), at)
    reader = reading(*rings)
    batches = [read(reader) for _ in range(5)]
    assert [len(batch) for batch in batches] == [BATCH_RECORDS] * 4 + [0]
    assert [int(message) for batch in batches for message in batch] == list(range(4 * BATCH_RECORDS))


# --- losses ---------------------------------------------------------------------------------------

DROPPED = re.compile(r"(\d+) records dropped in \d+ ms, (\S+) was full: (.+)")


def test_a_full_ring_is_told_in_one_warning_when_it_has_room_again(make_ring: MakeRing) -> None:
    ring = make_ring(4)
    reader = reading(ring)
    accepted = [write(ring, str(i)) for i in range(6)] + [write(ring, "x", severity=Severity.Error)]
    assert accepted == [True] * 4 + [False] * 3
    entries: list[LogEntry] = []

    def is_told() -> bool:
        batch = reader.read()
        entries.extend(reader.entry(batch, index) for index in range(len(batch.records)))
        return len(entries) > 4

    until(is_told, "the warning")
    assert [entry.message for entry in entries[:4]] == ["0", "1", "2", "3"]
    (warning,) = [entry for entry in entries if entry.severity == Severity.Warning]
    match = DROPPED.fullmatch(warning.message)
    assert match
    assert match.groups() == ("3", ring.segment.name, "1 Error, 2 Info")


def test_every_dropped_record_is_told_once(make_ring: MakeRing) -> None:
    ring = make_ring(2)
    reader = reading(ring)
    said = []
    for _ in range(100):
        for _ in range(5):
            write(ring, "x")
        said += read(reader, everything=False)
    said += read(reader)
    told = sum(int(match[1]) for message in said if (match := DROPPED.fullmatch(message)))
    assert told == sum(ring.segment.dropped()) == 300


def test_a_drop_count_that_goes_back_is_no_loss(make_ring: MakeRing) -> None:
    ring = make_ring(4)
    ring.segment.set("dropped", 10, Severity.Info)
    reader = reading(ring)
    assert len(read(reader)) == 1
    ring.segment.set("dropped", 3, Severity.Info)
    assert read(reader) == []


def test_what_an_overwriting_ring_lost_is_told(make_ring: MakeRing) -> None:
    ring = make_ring(8, overwrite=True)
    reader = reading(ring)
    for number in range(20):
        write(ring, str(number))
    said = read(reader)
    assert said == [
        *map(str, range(12, 20)),
        f"12 records overwritten in {ring.segment.name} before they were read",
    ]
    assert read(reader) == []


def test_what_a_rate_limit_suppressed_is_told_once_with_its_format(make_ring: MakeRing) -> None:
    ring = make_ring(8, formats={3: "Rule {rule} is {0:d} behind"})
    ring.segment.limit(3, per_second=0.001)
    reader = reading(ring)
    assert [write_event(ring.segment.bytes, 6, 3, 1000, (n,)) for n in range(4)] == [True, False, False, False]
    assert read(reader) == [
        "Rule  is 0 behind",
        "3 records suppressed by their rate limit: Rule {rule} is {0:d} behind",
    ]
    assert read(reader) == []


def test_reports_beyond_the_room_of_a_batch_come_with_the_next(make_ring: MakeRing) -> None:
    rings = [make_ring(1) for _ in range(REPORTS_MAX + 20)]
    for ring in rings:
        write(ring, "first")
        write(ring, "second")
    reader = reading(*rings)
    said = [message for _ in range(4) for message in read(reader)]
    told = {match[2] for message in said if (match := DROPPED.fullmatch(message))}
    assert told == {ring.segment.name for ring in rings}


def test_a_report_is_a_record_of_its_ring(make_ring: MakeRing) -> None:
    ring = make_ring(1, facility=Facility.Egress, core=3)
    write(ring, "first")
    write(ring, "second")
    reader = reading(ring)
    batch = reader.read(everything=True)
    report = reader.entry(batch, len(batch.records) - 1)
    assert (report.severity, report.facility, report.core) == (Severity.Warning, Facility.Egress, 3)
    assert report.timestamp_ns > 0


# --- damage ---------------------------------------------------------------------------------------

CURSORS = [-1, 0, 1, 3, 4, 5, 100, 1 << 62, MAX_I64 - 8, MIN_I64, MIN_I64 + 1, -(1 << 40)]


def check_recovery(reader: Reader, damaged: SharedSPSCRingBuffer, sound: SharedSPSCRingBuffer) -> None:
    """The reader settles, tells the damage at most once, and reads both rings when their writers go on."""
    write(sound, "sound", 1)
    first = read(reader)
    assert "sound" in first
    assert len(first) <= damaged.capacity + 3
    assert len(read(reader)) <= damaged.capacity + 3
    assert [read(reader) for _ in range(3)] == [[]] * 3
    damaged.segment.set("write_cursor", 40)
    read(reader)
    write(damaged, "going on", 1)
    write(sound, "sound again", 2)
    assert read(reader) == ["going on", "sound again"]


@given(written=int64s | st.sampled_from(CURSORS), cursor=int64s | st.sampled_from(CURSORS))
@example(MIN_I64, 5)
@example(MAX_I64, MIN_I64)
@example(-5, 0)
@settings(SHARED_FIXTURE)
def test_no_cursors_stall_the_reader_or_make_it_run_away(make_ring: MakeRing, written: int, cursor: int) -> None:
    damaged, sound = make_ring(4), make_ring(4)
    damaged.segment.set("write_cursor", written)
    damaged.segment.set("read_cursor", cursor)
    check_recovery(reading(damaged, sound), damaged, sound)
    for ring in (damaged, sound):
        ring.shutdown()


@given(written=st.lists(int64s | st.sampled_from(CURSORS), min_size=1, max_size=4), overwrite=st.booleans())
@settings(SHARED_FIXTURE)
def test_a_cursor_that_jumps_costs_no_other_ring_anything(
    make_ring: MakeRing, written: list[int], overwrite: bool
) -> None:
    damaged, sound = make_ring(4, overwrite=overwrite), make_ring(4)
    reader = reading(damaged, sound)
    write(damaged, "before", 1)
    assert read(reader) == ["before"]
    for cursor in written:
        damaged.segment.set("write_cursor", cursor)
        assert len(read(reader)) <= damaged.capacity + 3
        assert reader.lag() <= damaged.capacity
    check_recovery(reader, damaged, sound)
    for ring in (damaged, sound):
        ring.shutdown()


def test_the_lag_of_a_ring_is_at_most_its_capacity(make_ring: MakeRing) -> None:
    ring = make_ring(4)
    reader = reading(ring)
    write(ring, "one")
    assert reader.lag() == 1
    ring.segment.set("write_cursor", 1 << 62)
    assert reader.lag() == 4


@pytest.mark.parametrize("state", [STATE_EMPTY, STATE_WRITING, 77])
def test_a_record_that_was_never_finished_costs_only_itself(make_ring: MakeRing, state: int) -> None:
    ring = make_ring()
    for number in range(4):
        write(ring, str(number))
    ring.segment.memory[record_at(ring, 1)] = state
    reader = reading(ring)
    assert read(reader) == ["0", "2", "3", f"1 damaged records passed over in {ring.segment.name}"]
    assert read(reader) == []


def test_a_record_of_another_round_is_passed_over(make_ring: MakeRing) -> None:
    ring = make_ring()
    write(ring, "0")
    put(ring, record(b"1"))
    HEADER.set(memoryview(ring.segment.memory)[record_at(ring, 1) + 16 :], "magic", 77)
    write(ring, "2")
    assert read(reading(ring))[:2] == ["0", "2"]


def test_a_writer_killed_in_the_middle_of_a_record_is_told_when_its_successor_goes_on(make_ring: MakeRing) -> None:
    ring = make_ring()
    reader = reading(ring)
    write(ring, "whole")
    ring.segment.memory[record_at(ring, 1)] = STATE_WRITING
    ring.segment.claim()
    write(ring, "successor")
    assert read(reader) == [
        "whole",
        "successor",
        f"A writer of {ring.segment.name} was killed in the middle of a record, which is lost",
    ]


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 95, 96, 97, 159, 160])
def test_a_message_of_any_length_is_copied_whole(make_ring: MakeRing, length: int) -> None:
    ring = make_ring()
    reader = reading(ring)
    write(ring, "y" * 160, 1, pairs=(("key", "former"), ("other", "former")))
    message = ("0123456789" * 16)[:length]
    write(ring, message, 2)
    assert read(reader) == ["y" * 160, message]


def test_facility_is_the_ring_s_and_severity_a_known_one(make_ring: MakeRing) -> None:
    ring = make_ring(facility=Facility.Ingress)
    put(ring, record(b"forged", severity=0xFB).replace(b"\xfb\0", b"\xfb\xee", 1))
    assert lines(reading(ring).read(everything=True)) == ["[Error] [Ingress] forged\n"]


def test_a_core_that_can_not_be_does_not_harm_reports(make_ring: MakeRing) -> None:
    ring = make_ring(1)
    ring.segment.set("core", 0xFFFF_FFFF)
    write(ring, "first")
    write(ring, "second")
    reader = reading(SharedSPSCRingBuffer.attach(ring.segment.name))
    assert len(read(reader)) == 2


@pytest.mark.parametrize("kind", FORMATTERS)
@given(seed=st.integers(0, 2**32 - 1), overwrite=st.booleans(), consume=st.booleans())
@settings(SHARED_FIXTURE, max_examples=30)
def test_a_segment_of_random_bytes_makes_few_and_harmless_lines(
    make_ring: MakeRing, kind: str, seed: int, overwrite: bool, consume: bool
) -> None:
    ring = make_ring(8, overwrite=overwrite)
    attached = SharedSPSCRingBuffer.attach(ring.segment.name)
    random = np.random.default_rng(seed)
    reader = Reader(consume)
    for place in random.permutation(4):
        if place == 0:
            reader.add([attached])
        else:
            start = int(random.integers(ring.segment.size - 8))
            ring.segment.bytes[start:] = random.integers(0, 256, ring.segment.size - start, np.uint8)
            number = int(random.integers(MIN_I64, MAX_I64)) if place == 1 else int(random.integers(0, 100))
            ring.segment.set("write_cursor", number)
            for _ in range(3):
                put(ring, random.bytes(RECORD_BYTES))
    batch = reader.read(everything=True)
    said = lines(batch, kind, timestamps=True, fields=True)
    assert len(said) == len(batch.records) <= ring.capacity + 4 + FORMATS_MAX
    separator = "\n" if kind == "journal" else "\0"
    assert all(part.isprintable() for line in said for part in line.removesuffix("\n").split(separator))
    ring.shutdown()


def test_a_format_that_comes_later_is_used(make_ring: MakeRing) -> None:
    ring = make_ring(formats={1: "old {0:d}"})
    reader = reading(ring)
    assert write_event(ring.segment.bytes, 6, 1, 1, (5,))
    assert lines(reader.read(everything=True)) == ["[Info] [Test] old 5\n"]
    ring.segment.register(2, "new {0:d}")
    assert write_event(ring.segment.bytes, 6, 2, 1, (6,))
    assert lines(reader.read(everything=True)) == ["[Info] [Test] new 6\n"]


def test_each_ring_has_formats_of_its_own(make_ring: MakeRing) -> None:
    rings = [make_ring(formats={1: f"ring {n}: {{0:d}}"}) for n in range(3)]
    for n, ring in enumerate(rings):
        assert write_event(ring.segment.bytes, 6, 1, 1 + n, (n,))
    assert lines(reading(*rings).read(everything=True)) == [f"[Info] [Test] ring {n}: {n}\n" for n in range(3)]


@pytest.mark.parametrize("message", ["plain", "two\nlines", "undecodable \udcff", "long " * 100])
def test_the_log_may_say_anything_about_itself(make_ring: MakeRing, message: str) -> None:
    (line,) = lines(reading(make_ring()).say(Severity.Error, message))
    assert line.startswith("[Error] [Test] " + message[:3])
    assert line[:-1].isprintable()


# --- readers --------------------------------------------------------------------------------------


def test_readers_that_do_not_consume_take_nothing(make_ring: MakeRing) -> None:
    ring = make_ring(4)
    watchers = [reading(ring, consume=False) for _ in range(2)]
    consumer = reading(ring)
    for number in range(4):
        write(ring, str(number))
    assert [read(watcher) for watcher in watchers] == [["0", "1", "2", "3"]] * 2
    assert ring.unread() == 4
    assert not write(ring, "full")
    assert read(consumer)[:4] == ["0", "1", "2", "3"]
    assert ring.unread() == 0


def test_a_reader_that_does_not_consume_tells_what_it_missed(make_ring: MakeRing) -> None:
    ring = make_ring(4)
    watcher, consumer = reading(ring, consume=False), reading(ring)
    for number in range(10):
        write(ring, str(number))
        read(consumer)
    assert read(watcher) == [
        "6", "7", "8", "9", f"6 records overwritten in {ring.segment.name} before they were read",
    ]  # fmt: skip


def test_a_reader_that_does_not_consume_tells_only_losses_from_now_on(make_ring: MakeRing) -> None:
    ring = make_ring(1, formats={1: "x"})
    ring.segment.limit(1, per_second=0.001)
    for timestamp_ns in (1, 2, 3):
        write_event(ring.segment.bytes, 6, 1, timestamp_ns, ())
    write(ring, "refused")
    watcher = reading(ring, consume=False)
    assert read(watcher) == ["x"]


@pytest.mark.parametrize(("last", "expected"), [(0, []), (2, ["8", "9"]), (100, ["6", "7", "8", "9"])])
def test_a_reader_may_begin_with_the_last_records(make_ring: MakeRing, last: int, expected: list[str]) -> None:
    ring = make_ring(4, overwrite=True)
    for number in range(10):
        write(ring, str(number))
    watcher = Reader(consume=False)
    watcher.add([ring], last=last)
    assert read(watcher) == expected


def test_a_new_reader_goes_on_where_the_last_one_stopped(make_ring: MakeRing) -> None:
    ring = make_ring()
    write(ring, "first")
    assert read(reading(ring)) == ["first"]
    write(ring, "second")
    assert read(reading(ring)) == ["second"]


@pytest.fixture
def lossy(make_ring: MakeRing) -> tuple[Reader, list[SharedSPSCRingBuffer]]:
    """A reader of three rings that told each one's losses: overwritten, damaged and dropped."""
    rings = [make_ring(2, overwrite=True), make_ring(4), make_ring(1)]
    for number in range(6):
        write(rings[0], str(number))
    for number in range(3):
        write(rings[1], str(number))
        write(rings[2], str(number))
    rings[1].segment.memory[record_at(rings[1], 1)] = STATE_WRITING
    reader = reading(*rings)
    assert len(read(reader)) == 2 + 2 + 1 + 3
    return reader, rings


def test_adding_a_ring_keeps_the_places_and_losses_of_others(
    make_ring: MakeRing, lossy: tuple[Reader, list[SharedSPSCRingBuffer]]
) -> None:
    reader, rings = lossy
    added = make_ring()
    write(added, "added")
    reader.add([added])
    assert read(reader) == ["added"]
    for at, ring in enumerate(rings):
        write(ring, f"ring {at}", at)
    assert read(reader) == ["ring 0", "ring 1", "ring 2"]


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_removing_a_ring_keeps_the_places_and_losses_of_others(
    lossy: tuple[Reader, list[SharedSPSCRingBuffer]], gone: int
) -> None:
    reader, rings = lossy
    reader.remove([rings[gone]])
    assert read(reader) == []
    for at, ring in enumerate(rings):
        write(ring, f"ring {at}", at)
    assert read(reader) == [f"ring {at}" for at in range(3) if at != gone]


def test_losses_after_rings_came_and_went_are_counted_anew_for_none(
    make_ring: MakeRing, lossy: tuple[Reader, list[SharedSPSCRingBuffer]]
) -> None:
    reader, rings = lossy
    reader.add([make_ring()])
    reader.remove([rings[2]])
    for number in range(5):
        write(rings[0], str(number))
    assert read(reader)[-1] == f"3 records overwritten in {rings[0].segment.name} before they were read"


def test_a_reader_without_rings_reads_nothing(make_ring: MakeRing) -> None:
    reader = Reader()
    assert read(reader) == []
    ring = make_ring()
    reader.add([ring])
    reader.remove([ring])
    write(ring, "unheard")
    assert read(reader) == []
    assert reader.lag() == 0


# --- a writer that goes around --------------------------------------------------------------------


@njit(cache=True, nogil=True)
def go_around(segment: Any, key: Any, value: Any, count: int) -> None:
    """Write records, each of a number and what follows from it, in every cache line of the record."""
    for number in range(count):
        for index in range(20):
            value[index] = (number >> (8 * (index % 8))) & 0xFF
        arguments = (number, ~number, 3 * number, number ^ 0x55, number + 1, number + 2, number + 3, -number)
        write_event_about(segment, 6, 1, 1, arguments, key, value, 20)


@pytest.fixture
def going_around(make_ring: MakeRing) -> Iterator[SharedSPSCRingBuffer]:
    """A small ring that another process overwrites as fast as it can."""
    ring = make_ring(16, overwrite=True, formats={1: "{0:d}"})
    segment, value = ring.segment.bytes, np.zeros(20, np.uint8)
    go_around(segment, RULE_KEY, value, 1)
    pid = os.fork()
    if pid == 0:
        go_around(segment, RULE_KEY, value, FOREVER)
        os._exit(0)
    yield ring
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_record_that_is_overwritten_while_it_is_copied_is_never_torn(going_around: SharedSPSCRingBuffer) -> None:
    reader = reading(going_around)
    whole = 0

    def check_batch() -> bool:
        nonlocal whole
        batch = reader.read(everything=True)
        records = batch.records[batch.records[:, 6] == 1]  # reports are text
        words = records[:, 32:96].copy().view(np.int64)
        number = words[:, 0]
        expected = [number, ~number, 3 * number, number ^ 0x55, number + 1, number + 2, number + 3, -number]
        assert (words == np.stack(expected, axis=1)).all()
        value = number.copy().view(np.uint8).reshape(-1, 8)
        assert (records[:, 192 + 12 : 192 + 32] == np.hstack([value, value, value[:, :4]])).all()
        assert (np.diff(records[:, 16:24].copy().view(np.int64).ravel()) > 0).all()
        whole += len(records)
        return whole >= 500

    until(check_batch, "500 whole records")
