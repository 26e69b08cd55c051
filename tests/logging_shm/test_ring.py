"""The ring: what is written is read, from Python and from compiled code; a full ring drops and counts."""

import os
import signal
import struct
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from logging_shm import Facility, LogEntry, Logger, Segment, SegmentError, Severity, SharedSPSCRingBuffer
from logging_shm.compiled import write_event, write_text
from logging_shm.facility import RING_CAPACITY, WORKER_FACILITIES, segment_name
from logging_shm.layout import MESSAGE_BYTES_MAX, RECORD_BYTES, RECORDS_OFFSET, segment_bytes

MakeRing = Callable[..., SharedSPSCRingBuffer]
FORMATS = {1: "First packet of rule {rule} from {0:ip}:{1:port}"}
SHARED_FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
PRODUCED = 20_000


def entry(message: str, severity: Severity = Severity.Info, **fields: object) -> LogEntry:
    return LogEntry(severity=severity, facility=Facility.Test, message=message, **fields)  # type: ignore[arg-type]


def test_a_record_is_256_bytes_with_the_documented_offsets(make_ring: MakeRing) -> None:
    ring = make_ring(core=5)
    ring.write(entry("hello", Severity.Error, timestamp_ns=77, process=8, thread=9, pairs=(("rule", "tv"),)))
    record = bytes(ring.segment.bytes[RECORDS_OFFSET : RECORDS_OFFSET + 256])
    assert struct.unpack_from("<BBBBBBHQQII", record) == (2, 3, Facility.Test, 5, 1, 5, 0, 77, 0, 8, 9)
    assert record[32:37] == b"hello"
    assert record[192:194] == b"\x04\x02"
    assert record[196:200] == b"rule"
    assert record[204:206] == b"tv"


def test_rings_have_the_documented_names_and_sizes() -> None:
    names = {facility: segment_name(facility, 0) for facility in WORKER_FACILITIES}
    assert names[Facility.Ingress] == "mcr_dp_c0_ingress"
    assert segment_name(Facility.BufferPool, 3, "tv") == "mcr_tv_dp_c3_bufferpool"
    assert segment_name(Facility.Supervisor) == "mcr_supervisor"
    assert segment_name(Facility.ControlPlane, instance="tv") == "mcr_tv_controlplane"
    records = sum(RING_CAPACITY[facility] for facility in WORKER_FACILITIES)
    supervisor = RING_CAPACITY[Facility.Supervisor] + RING_CAPACITY[Facility.ControlPlane]
    assert [(n * records + supervisor) * RECORD_BYTES / (1 << 20) for n in (1, 2, 4)] == [6.5, 12.5, 24.5]


@given(message=st.text(max_size=300), value=st.text(max_size=40))
@SHARED_FIXTURE
def test_text_is_read_as_written_cut_to_its_room_and_printable(make_ring: MakeRing, message: str, value: str) -> None:
    ring = make_ring()
    assert ring.write(entry(message, pairs=(("key", value),)))
    read = ring.read()
    assert read is not None
    assert read.message.isprintable()
    if message.isprintable() and len(message.encode()) <= MESSAGE_BYTES_MAX:
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


def test_a_full_ring_drops_the_new_record_and_counts(make_ring: MakeRing) -> None:
    ring = make_ring(4)
    assert [ring.write(entry(str(i))) for i in range(6)] == [True] * 4 + [False] * 2
    assert ring.dropped() == 2
    assert ring.dropped() == 0
    assert [e.message for _ in range(5) if (e := ring.read())] == ["0", "1", "2", "3"]
    assert ring.write(entry("again"))


def test_levels_filter_in_python_and_in_compiled_code(make_ring: MakeRing) -> None:
    ring = make_ring()
    ring.segment.level = Severity.Warning
    assert ring.segment.level is Severity.Warning
    nothing = np.zeros(1, np.uint8)
    for severity in Severity:
        wanted = severity <= Severity.Warning
        assert ring.write(entry("x", severity)) == wanted
        assert write_event(ring.segment.bytes, int(severity), 1, 0, 0, 0, 0, 0, 0, 0, nothing, 0) == wanted
        while ring.read():
            pass


def test_typed_arguments_are_rendered_by_whoever_reads(make_ring: MakeRing) -> None:
    ring = make_ring(formats=FORMATS)
    rule = np.frombuffer(b"tv", np.uint8)
    assert write_event(ring.segment.bytes, 6, 1, 55, 0x0A000007, 5001, 0, 0, 0, 0, rule, 2)
    other = SharedSPSCRingBuffer.attach(ring.segment.name)
    read = other.read()
    assert read is not None
    assert read.message == "First packet of rule tv from 10.0.0.7:5001"
    assert (read.timestamp_ns, read.severity, read.pairs) == (55, Severity.Info, (("rule", "tv"),))


def test_text_from_compiled_code_reads_like_text_from_python(make_ring: MakeRing) -> None:
    ring = make_ring()
    text = np.frombuffer(b"from compiled code", np.uint8)
    assert write_text(ring.segment.bytes, 6, 0, text, len(text))
    read = ring.read()
    assert read is not None
    assert read.message == "from compiled code"
    assert read.timestamp_ns > 0


def test_an_unregistered_format_is_told_and_harms_nothing(make_ring: MakeRing) -> None:
    ring = make_ring()
    write_event(ring.segment.bytes, 6, 31, 0, 0, 0, 0, 0, 0, 0, np.zeros(1, np.uint8), 0)
    read = ring.read()
    assert read is not None
    assert read.message == "(format 31 is not registered)"


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
    ring.segment.header["write_cursor"] = written
    ring.segment.header["read_cursor"] = cursor
    read = 0
    while ring.read() is not None:
        read += 1
        assert read <= 4
    ring.shutdown()


def test_drained_records_stay_readable_until_overwritten(make_ring: MakeRing) -> None:
    ring = make_ring(4)
    for i in range(6):
        ring.write(entry(str(i)))
        ring.read()
    assert [e.message for e in ring.last(10)] == ["2", "3", "4", "5"]
    assert [e.message for e in ring.last(2)] == ["4", "5"]


def test_several_threads_share_a_logger(make_ring: MakeRing) -> None:
    import threading

    ring = make_ring(4096)
    logger = Logger(ring, Facility.Test)
    threads = [threading.Thread(target=lambda n=n: [logger.info(f"{n}") for _ in range(500)]) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    messages = [e.message for _ in range(4096) if (e := ring.read())]
    assert sorted(messages) == sorted(str(n) for n in range(4) for _ in range(500))


def produce(segment: Segment) -> None:
    """In a child: write numbered records from compiled code, waiting where the ring is full."""
    nothing = np.zeros(1, np.uint8)
    for number in range(PRODUCED):
        while not write_event(segment.bytes, 6, 1, number + 1, number, -number, 0, 0, 0, number, nothing, 0):
            os.sched_yield()


def test_a_writing_process_and_a_reader_lose_and_tear_nothing(make_ring: MakeRing) -> None:
    ring = make_ring(64, formats={1: "{0:d} {1:d} {5:d}"})
    pid = os.fork()
    if pid == 0:
        produce(ring.segment)
        os._exit(0)
    expected = 0
    while expected < PRODUCED:
        read = ring.read()
        if read is None:
            os.sched_yield()
            continue
        assert read.message == f"{expected} {-expected} {expected}"
        assert (read.sequence, read.timestamp_ns) == (expected, expected + 1)
        expected += 1
    assert os.waitpid(pid, 0)[1] == 0
    assert ring.read() is None


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


def test_the_name_of_a_living_owner_is_refused_with_its_pid(name: str) -> None:
    with (
        SharedSPSCRingBuffer.create(name, 8),
        pytest.raises(SegmentError, match=f"belongs to process {os.getpid()}, which is running"),
    ):
        SharedSPSCRingBuffer.create(name, 8)


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\0" * segment_bytes(1)])
def test_shared_memory_that_is_no_ring_is_refused(name: str, content: bytes) -> None:
    with open(f"/dev/shm/{name}", "wb") as file:  # noqa: PTH123
        file.write(content)
    with pytest.raises(SegmentError, match=name):
        SharedSPSCRingBuffer.attach(name)


def test_a_segment_is_private_and_wholly_allocated(make_ring: MakeRing) -> None:
    ring = make_ring(16)
    status = os.stat(f"/dev/shm/{ring.segment.name}")  # noqa: PTH116
    assert status.st_mode & 0o777 == 0o600
    assert status.st_blocks * 512 >= segment_bytes(16)
