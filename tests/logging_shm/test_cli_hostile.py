"""What a writer that went wrong left in a header, and what of it can hurt who looks: nothing."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from logging_shm import LogEntry, Severity, SharedSPSCRingBuffer
from logging_shm.cli.choose import Rings
from logging_shm.cli.clean import clean
from logging_shm.cli.follow import Filter, Follower
from logging_shm.cli.list_rings import describe
from logging_shm.cli.stat import Meter
from logging_shm.layout import FORMATS_OFFSET, HEADER, RECORDS_OFFSET
from logging_shm.segment import SHM_DIRECTORY
from tests.logging_shm.command import new_instance, ring_of

HEADER_END = HEADER["limits"] + HEADER.fields["limits"].bytes


@pytest.mark.parametrize("command", [("list",), ("stat", "--count", "1", "--interval-s", "0.1"), ("clean",)])
def test_a_segment_that_is_cut_short_while_it_is_looked_at_ends_no_command(command: tuple[str, ...]) -> None:
    """An access beyond the end of a mapped file is a SIGBUS."""
    instance = new_instance()
    with ring_of(instance) as cut:
        cut.write(LogEntry(Severity.Info, cut.facility, "gone in a moment"))
        program = [sys.executable, "-m", "tests.logging_shm.truncating", *command, "--instance", instance]
        result = subprocess.run(program, capture_output=True, text=True, check=False)
        assert (SHM_DIRECTORY / cut.segment.name).stat().st_size == 0
    assert result.returncode == 0, result


@pytest.fixture(scope="module")
def ring() -> Iterator[SharedSPSCRingBuffer]:
    """A ring that each example spoils anew."""
    with ring_of(new_instance()) as ring:
        for number in range(3):
            ring.write(LogEntry(Severity.Info, ring.facility, f"{number}"))
        yield ring


@given(
    header=st.binary(min_size=HEADER_END, max_size=HEADER_END),
    formats=st.binary(max_size=RECORDS_OFFSET - FORMATS_OFFSET),
    written=st.one_of(st.integers(0, 100), st.integers(-(1 << 63), (1 << 63) - 1)),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
def test_no_header_can_crash_who_looks_or_put_what_moves_a_cursor_into_a_line(
    ring: SharedSPSCRingBuffer, header: bytes, formats: bytes, written: int
) -> None:
    memory = ring.segment.memory
    checked = HEADER["core"]  # what lies before it is checked when a segment is attached
    memory[checked:HEADER_END] = header[checked:]
    memory[FORMATS_OFFSET : FORMATS_OFFSET + len(formats)] = formats
    ring.segment.set("write_cursor", written)
    chosen = Rings([ring.segment.name])
    (seen,) = chosen.now()
    assert describe(seen)["core"] in {None, *range(255)}
    lines = "".join(Follower([seen], Filter(), last=10).present()).splitlines()
    assert all(line.isprintable() for line in lines)
    assert len(Meter(chosen).look()) == 1
    outcome = clean(instance=ring.segment.name.split("_")[1], dry_run=True)
    assert ring.segment.name in {**outcome.kept, **outcome.removed}
    seen.segment.finish_dead()
