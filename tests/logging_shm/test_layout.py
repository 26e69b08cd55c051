"""The layout is what docs/logging.md says: for readers in other languages, and for those after a crash."""

import re
import struct
from pathlib import Path

import pytest

from logging_shm import Facility, Logger, Severity, SharedSPSCRingBuffer
from logging_shm.compiled import write_event
from logging_shm.facility import RING_CAPACITY, WORKER_FACILITIES, segment_name
from logging_shm.layout import HEADER, LIMIT, PAIR, RECORD, RECORD_BYTES, SEGMENT_MAGIC, Layout, segment_bytes
from tests.logging_shm.conftest import MakeRing
from tools.environment import CHECKOUT

TYPES = {"u8": "B", "u16": "H", "u32": "I", "i64": "q"}


def documented(title: str) -> dict[str, tuple[int, str, int]]:
    """A table of docs/logging.md: offset, letter and count by field."""
    text = (CHECKOUT / "docs" / "logging.md").read_text()
    section = text.partition(f"### {title}")[2].partition("\n### ")[0]
    rows = re.findall(r"^\| (\d+) \| (\w+) \| (\w+?)(?:\[(\d+)\])? \|$", section, re.MULTILINE)
    return {name: (int(offset), TYPES[kind], int(count or 1)) for offset, name, kind, count in rows}


@pytest.mark.parametrize(
    ("title", "layout"),
    [("Record: 256", RECORD), ("Pair: 32", PAIR), ("Header: 4096", HEADER)],
    ids=["record", "pair", "header"],
)
def test_offsets_and_types_are_the_documented_ones(title: str, layout: Layout) -> None:
    defined = {name: (field.offset, field.letter, field.count) for name, field in layout.fields.items()}
    assert documented(title) == defined
    assert f": {layout.bytes}" in title


@pytest.mark.parametrize("layout", [RECORD, PAIR, HEADER, LIMIT], ids=["record", "pair", "header", "limit"])
def test_fields_are_aligned_and_do_not_overlap(layout: Layout) -> None:
    end = 0
    for field in layout.fields.values():
        assert field.offset >= end
        assert field.offset % struct.calcsize(f"<{field.letter}") == 0
        end = field.offset + field.bytes
    assert end <= layout.bytes


def test_writer_and_reader_never_share_a_cache_line() -> None:
    writers = {HEADER[name] // 64 for name in ("write_cursor", "read_cursor_seen", "unfinished", "scratch", "dropped")}
    assert HEADER["read_cursor"] // 64 not in writers
    assert HEADER["level_mask"] // 64 not in writers


def test_a_segment_is_read_with_nothing_but_struct(make_ring: MakeRing) -> None:
    ring = make_ring(4, core=3, formats={7: "{0:d} of {1:ip}"}, instance="tv")
    Logger(ring).error("hello", rule="sport")
    assert write_event(ring.segment.bytes, 6, 7, 55, (-2, 0x0A000007))
    raw = Path(f"/dev/shm/{ring.segment.name}").read_bytes()
    assert len(raw) == 4096 + 4096 + 4 * 256 == segment_bytes(4)
    magic, version, record_bytes, capacity, facility, core = struct.unpack_from("<qIIqII", raw)
    assert (magic, version, record_bytes, capacity, facility, core) == (SEGMENT_MAGIC, 2, 256, 4, Facility.Test, 3)
    assert raw[32:64].rstrip(b"\0") == b"tv"
    assert struct.unpack_from("<q", raw, 128) == (2,)
    assert struct.unpack_from("<q", raw, 256) == (0,)
    assert raw[4096 + 7 * 128 :][:128].rstrip(b"\0") == b"{0:d} of {1:ip}"
    text, typed = (raw[8192 + at : 8192 + at + 256] for at in (0, 256))
    assert struct.unpack_from("<BBBBBBH", text) == (2, Severity.Error, Facility.Test, 5, 1, 3, 0)
    assert text[32:37] == b"hello"
    assert (text[192], text[193], text[196:200], text[204:209]) == (4, 5, b"rule", b"sport")
    assert struct.unpack_from("<BBBBBBHqq", typed) == (2, Severity.Info, Facility.Test, 16, 0, 3, 7, 55, 1)
    assert struct.unpack_from("<qq", typed, 32) == (-2, 0x0A000007)


def test_rings_have_the_documented_names_and_sizes() -> None:
    names = {facility: segment_name(facility, 0) for facility in WORKER_FACILITIES}
    assert names[Facility.Ingress] == "mcr_dp_c0_ingress"
    assert segment_name(Facility.BufferPool, 3, "tv") == "mcr_tv_dp_c3_bufferpool"
    assert segment_name(Facility.Supervisor) == "mcr_supervisor"
    assert segment_name(Facility.ControlPlane, instance="tv") == "mcr_tv_controlplane"
    records = sum(RING_CAPACITY[facility] for facility in WORKER_FACILITIES)
    supervisor = RING_CAPACITY[Facility.Supervisor] + RING_CAPACITY[Facility.ControlPlane]
    assert [(n * records + supervisor) * RECORD_BYTES / (1 << 20) for n in (1, 2, 4)] == [6.5, 12.5, 24.5]


def test_a_segment_is_private_and_wholly_allocated(make_ring: MakeRing) -> None:
    ring: SharedSPSCRingBuffer = make_ring(16)
    status = Path(f"/dev/shm/{ring.segment.name}").stat()
    assert status.st_mode & 0o777 == 0o600
    assert status.st_blocks * 512 >= segment_bytes(16)
