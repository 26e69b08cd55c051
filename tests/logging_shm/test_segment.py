"""Segments after crashes: what is whose, what may be removed, and what a killed writer leaves behind."""

import mmap
import os
import pwd
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from logging_shm import Drain, Facility, LogEntry, Segment, SegmentError, Severity, SharedSPSCRingBuffer
from logging_shm.layout import RECORD, RECORD_BYTES, RECORDS_OFFSET, STATE_READY, STATE_WRITING
from logging_shm.segment import is_running, names, owner_of, process_start_ticks, remove_stale
from logging_shm.sinks.url import Described
from tests.logging_shm.remnants import FOREIGN, REMNANTS, SHM, clear, in_child, of_a_dead_process, waiting

CAPACITY = 8


@pytest.fixture
def name(name: str) -> Iterator[str]:
    """A segment name; whatever the test put there is removed."""
    yield name
    clear(name)


def entry(message: str) -> LogEntry:
    return LogEntry(Severity.Info, Facility.Test, message)


def messages(ring: SharedSPSCRingBuffer) -> list[str]:
    return [read.message for _ in range(ring.capacity) if (read := ring.read())]


def snapshot(path: Path) -> tuple[int, int, bytes]:
    """What must not change of a foreign file: which it is, its mode, and its content or target."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        return status.st_ino, status.st_mode, os.fsencode(path.readlink())
    return status.st_ino, status.st_mode, path.read_bytes() if path.is_file() else b""


@contextmanager
def as_user(name: str) -> Iterator[None]:
    """Act as another user for a while, as far as the kernel's checks go."""
    os.seteuid(pwd.getpwnam(name).pw_uid)
    try:
        yield
    finally:
        os.seteuid(0)


# --- what a killed writer leaves --------------------------------------------------------------------


def test_what_was_written_before_kill_9_is_read_to_the_end(name: str) -> None:
    def write_and_die() -> None:
        ring = SharedSPSCRingBuffer.create(name, CAPACITY)
        for number in range(5):
            ring.write(entry(str(number)))
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(write_and_die) == -signal.SIGKILL
    assert messages(SharedSPSCRingBuffer.attach(name)) == list("01234")


def half_written(ring: SharedSPSCRingBuffer) -> None:
    """Leave the ring as a writer does that is killed between the two states of a record."""
    cursor = ring.segment.get("write_cursor")
    record = memoryview(ring.segment.memory)[RECORDS_OFFSET + (cursor & (ring.capacity - 1)) * RECORD_BYTES :]
    RECORD.set(record, "state", STATE_WRITING)
    RECORD.set(record, "message_length", 7)


def test_a_writer_killed_inside_a_record_costs_that_record_only_and_the_ring_goes_on(name: str) -> None:
    with SharedSPSCRingBuffer.create(name, CAPACITY) as ring:

        def write_half_and_die() -> None:
            heir = SharedSPSCRingBuffer.attach(name)
            heir.segment.claim()
            heir.write(entry("whole"))
            half_written(heir)
            os.kill(os.getpid(), signal.SIGKILL)

        in_child(write_half_and_die)
        successor = SharedSPSCRingBuffer.attach(name)
        successor.segment.claim()
        successor.write(entry("after"))
        assert messages(ring) == ["whole", "after"]
        assert ring.segment.get("unfinished") == 1


def test_a_record_that_was_finished_but_not_counted_is_kept(name: str) -> None:
    with SharedSPSCRingBuffer.create(name, CAPACITY) as ring:

        def write_and_die_before_the_cursor_moves() -> None:
            heir = SharedSPSCRingBuffer.attach(name)
            heir.segment.claim()
            heir.write(entry("finished"))
            heir.segment.set("write_cursor", 0)
            os.kill(os.getpid(), signal.SIGKILL)

        in_child(write_and_die_before_the_cursor_moves)
        successor = SharedSPSCRingBuffer.attach(name)
        successor.segment.claim()
        successor.write(entry("after"))
        assert messages(ring) == ["finished", "after"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_former_lap_of_a_full_ring_is_not_taken_for_what_the_killed_writer_left(name: str, overwrite: bool) -> None:
    with SharedSPSCRingBuffer.create(name, CAPACITY, overwrite=overwrite) as ring:
        for number in range(CAPACITY):
            ring.write(entry(str(number)))
        ring.segment.finish_dead()
        assert ring.segment.get("write_cursor") == CAPACITY
        assert messages(ring) == list("01234567")


@pytest.mark.parametrize("field", ["write_cursor", "unfinished"])
def test_no_number_that_a_writer_leaves_can_stop_its_successor(name: str, field: str) -> None:
    with SharedSPSCRingBuffer.create(name, CAPACITY) as ring:
        greatest = (1 << 63) - 1
        half_written(ring)
        ring.segment.set(field, greatest)
        if field == "write_cursor":
            record = memoryview(ring.segment.memory)[RECORDS_OFFSET + (CAPACITY - 1) * RECORD_BYTES :]
            RECORD.set(record, "state", STATE_READY)
            RECORD.set(record, "sequence", greatest)
        ring.segment.finish_dead()
        assert ring.segment.get(field) == greatest


# --- whose a segment is -----------------------------------------------------------------------------


def test_a_segment_belongs_to_its_writer_then_to_its_creator_then_to_nobody(name: str) -> None:
    with waiting(lambda: SharedSPSCRingBuffer.create(name, CAPACITY)) as creator:
        with waiting(SharedSPSCRingBuffer.attach(name).segment.claim) as writer:
            assert owner_of(name) == writer
        assert owner_of(name) == creator
    assert owner_of(name) is None


def test_a_reused_pid_is_told_by_its_start_time(name: str) -> None:
    segment = Segment.create(name, Facility.Test, CAPACITY)
    for field in ("process_start_ticks", "creator_start_ticks"):
        segment.set(field, segment.get(field) - 1)
    assert owner_of(name) is None
    assert remove_stale(name)
    assert not (SHM / name).exists()


def test_a_process_that_ended_and_was_not_waited_for_is_dead() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    ticks = process_start_ticks(pid) or 0
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert not is_running(pid, ticks)
    os.waitpid(pid, 0)


def test_a_process_may_have_any_name() -> None:
    def rename() -> None:
        Path("/proc/self/comm").write_bytes(b") Z \xff 1")

    with waiting(rename) as pid:
        assert is_running(pid, process_start_ticks(pid) or 0)


# --- what a name may be -----------------------------------------------------------------------------


@pytest.mark.parametrize("make", REMNANTS.values(), ids=REMNANTS)
def test_what_a_dead_process_left_half_made_or_damaged_is_stale(name: str, make: Callable[[str], None]) -> None:
    make(name)
    with pytest.raises(SegmentError, match=name):
        SharedSPSCRingBuffer.attach(name)
    assert owner_of(name) is None
    with SharedSPSCRingBuffer.create(name, CAPACITY) as ring:
        ring.write(entry("new"))
        assert messages(ring) == ["new"]


@pytest.mark.parametrize("make", REMNANTS.values(), ids=REMNANTS)
def test_what_is_half_made_or_damaged_belongs_to_whoever_maps_it_or_has_it_open(
    name: str, make: Callable[[str], None]
) -> None:
    make(name)
    with waiting(lambda: os.open(SHM / name, os.O_RDWR)) as pid:
        assert owner_of(name) == pid
        with pytest.raises(SegmentError, match=f"{name} belongs to process {pid}, which is running: stop it, or"):
            SharedSPSCRingBuffer.create(name, CAPACITY)


def map_and_close(name: str) -> mmap.mmap:
    with (SHM / name).open("r+b") as file:
        return mmap.mmap(file.fileno(), 0)


def test_another_version_that_a_process_maps_belongs_to_that_process(name: str) -> None:
    REMNANTS["another version"](name)
    with waiting(lambda: map_and_close(name)) as pid:
        assert owner_of(name) == pid
    assert owner_of(name) is None


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_file_is_refused_and_neither_removed_nor_written_to(name: str, make: Callable[[str], None]) -> None:
    make(name)
    before = snapshot(SHM / name)
    with pytest.raises(SegmentError, match=f"/dev/shm/{name}"):
        owner_of(name)
    with pytest.raises(SegmentError, match=f"/dev/shm/{name} exists .* remove it, or choose another"):
        SharedSPSCRingBuffer.create(name, CAPACITY)
    assert snapshot(SHM / name) == before


def test_another_users_remnant_is_foreign_unless_that_user_is_meant(name: str) -> None:
    REMNANTS["empty"](name)
    stranger = pwd.getpwnam("daemon").pw_uid
    os.chown(SHM / name, stranger, -1)
    with pytest.raises(SegmentError):
        owner_of(name)
    assert owner_of(name, stranger) is None


def test_another_users_segment_is_foreign_unless_that_user_is_meant(name: str) -> None:
    of_a_dead_process(name)
    stranger = pwd.getpwnam("daemon").pw_uid
    os.chown(SHM / name, stranger, -1)
    with pytest.raises(SegmentError, match=f"/dev/shm/{name} belongs to user id {stranger}"):
        owner_of(name)
    with pytest.raises(SegmentError, match=f"/dev/shm/{name} exists"):
        SharedSPSCRingBuffer.create(name, CAPACITY)
    assert owner_of(name, stranger) is None


def test_who_may_not_look_at_all_processes_is_told_to_run_as_root(name: str) -> None:
    REMNANTS["empty"](name)
    os.chown(SHM / name, pwd.getpwnam("daemon").pw_uid, -1)
    with as_user("daemon"), pytest.raises(SegmentError, match=r"only root can tell .*: run as root"):
        owner_of(name)


def test_files_that_are_not_called_like_segments_are_never_looked_at(name: str) -> None:
    other = SHM / f"x{name}"
    other.touch()
    try:
        assert f"x{name}" not in names()
    finally:
        other.unlink()


def test_a_header_without_its_magic_is_no_segment_yet(name: str) -> None:
    segment = Segment.create(name, Facility.Test, CAPACITY)
    segment.set("magic", 0)
    with pytest.raises(SegmentError, match="is no log segment"):
        SharedSPSCRingBuffer.attach(name)
    assert owner_of(name) == os.getpid()
    segment.close()


def test_a_rescued_ring_is_drained_with_its_unfinished_record_told(name: str, tmp_path: Path) -> None:
    def write_half_and_die() -> None:
        ring = SharedSPSCRingBuffer.create(name, CAPACITY)
        ring.write(entry("last words"))
        half_written(ring)
        os.kill(os.getpid(), signal.SIGKILL)

    in_child(write_half_and_die)
    log = tmp_path / "log"
    drain = Drain([Described(f"file:{log}").open()], follow=name)
    drain.start()
    drain.stop()
    assert log.read_text().splitlines() == [
        "[Info] [Test] last words",
        f"[Warning] [Test] A writer of {name} was killed in the middle of a record, which is lost",
    ]
    assert not (SHM / name).exists()
