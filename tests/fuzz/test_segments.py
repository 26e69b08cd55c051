"""Log segments full of nonsense: no reader crashes, waits for ever, grows, or lets a forged line out.

MCR_FUZZ_SEGMENTS (default 8 000; the long run has 1 000 000) says how many segments, MCR_FUZZ_SEED which; `--minutes`
how long instead. They are read in a child process, see segments.py; one that kills it is kept and named.
"""

import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from logging_shm import Facility, Severity, SharedSPSCRingBuffer
from logging_shm.cli.follow import Filter, Follower
from logging_shm.drain import Drain
from logging_shm.layout import CAPACITY_MAX, HEADER, SEGMENT_MAGIC, segment_bytes
from logging_shm.sinks.file import FileSink
from logging_shm.sinks.selection import Selection
from relay.errors import PreflightError
from relay.supervisor.segments import remove_stale
from tests.fuzz import children, truncating
from tests.fuzz.scribbler import scribbling
from tests.logging_shm.command import mcrlog, mcrlog_alone, new_instance, ring_of
from tests.logging_shm.remnants import SHM, clear

SEGMENTS = children.count("MCR_FUZZ_SEGMENTS", 8_000)
SEED = children.count("MCR_FUZZ_SEED", 1)
CAPACITY = 1024
SOUND_RECORDS = 20_000
DEADLINE_S = 60.0
GROWTH_BYTES_MAX = 64 << 20
CHECKED_BYTES = HEADER["core"]  # what lies before is checked when a segment is attached


@pytest.fixture
def instance() -> Iterator[str]:
    """A name of one's own; whatever a test left under it is removed."""
    instance = new_instance()
    yield instance
    for path in SHM.glob(f"mcr_{instance}*"):
        clear(path.name)


def test_readers_survive_whatever_a_segment_holds(tmp_path: Path, instance: str, fuzz_seconds: float) -> None:
    how_much = ("--seconds", str(fuzz_seconds)) if fuzz_seconds else ("--segments", str(SEGMENTS))
    kept = tmp_path / "segment"

    def keep() -> None:
        segment = SHM / f"mcr_{instance}_dp_c0_ingress"
        if segment.exists():
            shutil.copy(segment, kept)

    arguments = ("--instance", instance, "--seed", str(SEED), *how_much)
    ended = children.run("segments", *arguments, progress=tmp_path / "progress", on_end=keep)
    where = f"segment {ended.progress.number} of seed {SEED}, kept as {kept}"
    assert not ended.stalled, f"no progress any more at {where}"
    assert ended.status == 0, f"status {ended.status} at {where}\n{ended.output}"
    print(ended.output)


def scribbled(ring: SharedSPSCRingBuffer) -> Path:
    return SHM / ring.segment.name


def test_a_writer_that_scribbles_while_it_is_read_harms_nobody_else(tmp_path: Path, instance: str) -> None:
    """The drain goes on, the sound ring's records all arrive in order, and nothing grows."""
    target = tmp_path / "log"
    sink = FileSink(target, selection=Selection(facilities=frozenset({Facility.Supervisor})))
    hostile_ring = ring_of(instance, "dp_c0_ingress", capacity=CAPACITY)
    with hostile_ring as hostile, ring_of(instance, capacity=CAPACITY) as sound:
        drain = Drain([sink])
        drain.add([hostile, sound])
        drain.start()
        before_bytes = children.resident_bytes()
        deadline_s = time.monotonic() + DEADLINE_S
        with scribbling(scribbled(hostile), "--first", str(CHECKED_BYTES)):
            for number in range(SOUND_RECORDS):
                while sound.unread() >= CAPACITY // 2:
                    assert time.monotonic() < deadline_s, "the drain does not read the sound ring any more"
                    time.sleep(0.001)
                assert sound.append(Severity.Info, f"{number}")
                if number % 500 == 0:
                    watch(hostile.segment.name)
            while sound.unread():
                assert time.monotonic() < deadline_s
                time.sleep(0.001)
            stopper = threading.Thread(target=drain.stop, daemon=True)
            stopper.start()
            stopper.join(DEADLINE_S)
            assert not stopper.is_alive(), "the drain can't be stopped"
        grown_bytes = children.resident_bytes() - before_bytes
    lines = [line for line in target.read_text().splitlines() if "[Supervisor]" in line]
    assert lines == [f"[Info] [Supervisor] {number}" for number in range(SOUND_RECORDS)]
    assert grown_bytes < GROWTH_BYTES_MAX, f"{grown_bytes >> 20} MiB"


def watch(name: str) -> None:
    """As mcrlog does meanwhile, and any Python program."""
    ring = SharedSPSCRingBuffer.attach(name)
    assert all(line[:-1].isprintable() for line in Follower([ring], Filter(), last=10).present())
    assert all(entry.message.isprintable() for entry in ring.last(10))
    ring.unread()
    ring.dropped()


def test_a_segment_that_is_truncated_while_it_is_read_harms_nobody_else(tmp_path: Path, instance: str) -> None:
    """In a child process: an access to a page that is not there any more is a SIGBUS."""
    log = tmp_path / "log"
    ended = children.run("truncating", "--instance", instance, "--log", str(log), progress=tmp_path / "progress")
    assert ended.status == 0, f"status {ended.status} at record {ended.progress.number}\n{ended.output}"
    lines = [line for line in log.read_text().splitlines() if "[Supervisor]" in line]
    assert lines == [f"[Info] [Supervisor] {number}" for number in range(truncating.RECORDS)]


def test_a_cursor_that_runs_away_holds_no_reader(instance: str) -> None:
    """The writer's cursor is always ahead, and there is no record: read() says so instead of looking for ever."""
    with ring_of(instance, "dp_c0_ingress", capacity=CAPACITY) as hostile:
        ring = SharedSPSCRingBuffer.attach(hostile.segment.name)
        runaway = ("--runaway", str(HEADER["write_cursor"]), str(HEADER["read_cursor"]), str(CAPACITY // 2))
        with scribbling(scribbled(hostile), *runaway):
            for _ in range(10):
                missed = ring.missed
                assert ring.read() is None
                assert ring.missed - missed <= CAPACITY + 1


# --- files that only have the name of a segment -----------------------------------------------------------------


def sparse(size: int, header: bytes = b"", mode: int = 0o600, uid: int = 0) -> str:
    """A shell command that makes a file of that size, which holds nothing but a header."""
    octal = "".join(f"\\{byte:03o}" for byte in header)
    make = f"printf '{octal}' > $FILE && truncate -s {size} $FILE && chmod {mode:o} $FILE"
    return f"{make} && chown {uid} $FILE"


MAGIC = SEGMENT_MAGIC.to_bytes(8, "little") + (2).to_bytes(4, "little") + (256).to_bytes(4, "little")
SOUND_HEADER = MAGIC + (64).to_bytes(8, "little")
HUGE = 1 << 62
FILES = {
    "zeros of a petabyte": sparse(segment_bytes(1 << 42)),
    "zeros of a petabyte, of another user": sparse(segment_bytes(1 << 42), uid=65534),
    "zeros of the greatest ring": sparse(segment_bytes(CAPACITY_MAX)),
    "huge with a sound header": sparse(HUGE, SOUND_HEADER),
    "huge with a sound header, of another user": sparse(HUGE, SOUND_HEADER, uid=65534),
    "huge with any mode": sparse(HUGE, SOUND_HEADER, mode=0o666),
    "huge with the greatest capacity": sparse(HUGE, MAGIC + (1 << 62).to_bytes(8, "little")),
    "one byte": sparse(1),
    "fifo": "mkfifo -m 600 $FILE",
    "fifo that anybody may write": "mkfifo -m 666 $FILE",
    "directory": "mkdir $FILE",
    "socket": "python3 -c 'import os, socket; socket.socket(socket.AF_UNIX).bind(os.environ[\"FILE\"])'",
    "device": "mknod $FILE c 1 5",
    "link to a device": "ln -s /dev/zero $FILE",
    "link to a secret": "ln -s /etc/shadow $FILE",
    "link to itself": "ln -s $FILE $FILE",
    "link to a segment": "ln -s /dev/shm/mcr_supervisor $FILE",
}
SHOWN_BY_NAME = ("huge with a sound header", "fifo", "directory", "link to a secret")
COMMANDS = ("list", "list --json", "dump", "tail", "stat --count 1 --interval-s 0.1", "clean --dry-run", "clean")


@pytest.mark.skipif(os.geteuid() != 0, reason="a /dev/shm of one's own needs root")
def test_files_that_only_have_the_name_are_told_in_lines_and_never_followed() -> None:
    names = [f"mcr_dp_c{number}_ingress" for number in range(len(FILES))] + ["mcr_dp_c0_stats"]
    makes = [*FILES.values(), sparse(HUGE)]
    made = "; ".join(
        f"FILE=/dev/shm/{name}; export FILE; {{ {make}; }} || exit 9" for name, make in zip(names, makes, strict=True)
    )
    by_name = dict(zip(FILES, names, strict=False))
    commands = [f"dump {by_name[kind]}" for kind in SHOWN_BY_NAME] + list(COMMANDS)
    runs = "; ".join(f"echo command {command}; timeout 20 $MCRLOG {command}; echo status $?" for command in commands)
    result = mcrlog_alone(f"{made}; {{ {runs}; }} 2>&1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Traceback" not in result.stdout, result.stdout
    statuses = [int(status) for status in re.findall(r"^status (\d+)$", result.stdout, re.MULTILINE)]
    assert len(statuses) == len(commands), result.stdout
    assert set(statuses) <= {0, 1}, result.stdout
    assert all(line.isprintable() for line in result.stdout.splitlines()), result.stdout
    assert "root:" not in result.stdout


def huge_file(instance: str, size: int, header: bytes) -> Path:
    """What a worker that was taken over may leave with its user's rights, for the next start to read for days."""
    path = SHM / f"mcr_{instance}_dp_c0_ingress"
    path.write_bytes(header)
    path.chmod(0o600)
    os.truncate(path, size)
    return path


def test_a_relay_refuses_a_name_that_a_huge_file_has(instance: str) -> None:
    path = huge_file(instance, segment_bytes(1 << 42), b"")
    with pytest.raises(PreflightError, match=r"mcr_.*_dp_c0_ingress.*remove it, or choose another --instance"):
        remove_stale(instance)
    assert path.exists()


def test_a_huge_file_that_was_a_segment_is_removed_when_a_relay_starts(instance: str) -> None:
    path = huge_file(instance, HUGE, SOUND_HEADER)
    remove_stale(instance)
    assert not path.exists()


def test_many_names_are_listed_each_once(instance: str) -> None:
    """A thousand empty files under our names: told, and nothing else."""
    for number in range(1000):
        (SHM / f"mcr_{instance}_dp_c{number}_ingress").touch(0o600)
    result = mcrlog("list", "--instance", instance)
    assert result.returncode == 0
    assert "Traceback" not in result.stderr
    assert result.stderr.count("is truncated") == 1000
