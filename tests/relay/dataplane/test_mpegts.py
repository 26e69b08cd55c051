"""Transport stream counters: each rule of ISO/IEC 13818-1 and TR 101 290 by itself, and all against a slow model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.dataplane import layout, mpegts
from relay.dataplane.memory import address_of

MS = 1_000_000
PCR_MS = 27_000


def cell(
    pid: int = 256,
    continuity: int = 0,
    payload: bool = True,
    pcr: int | None = None,
    discontinuity: bool = False,
    sync: int = 0x47,
    error: bool = False,
    unit_start: bool = False,
) -> bytes:
    has_adaptation = not payload or pcr is not None or discontinuity
    control = has_adaptation << 5 | payload << 4 | continuity & 15
    head = bytes([sync, error << 7 | unit_start << 6 | pid >> 8, pid & 0xFF, control])
    if not has_adaptation:
        return head + bytes(184)
    field = bytes([discontinuity << 7 | (pcr is not None) << 4])
    if pcr is not None:
        base, extension = divmod(pcr, 300)
        field += ((base << 15 | 0x7E00 | extension) & (1 << 48) - 1).to_bytes(6, "big")
    length = len(field) if payload else 183
    return (head + bytes([length]) + field).ljust(188, b"\xff")


class Stream:
    """A stream that is known to carry cells."""

    def __init__(self) -> None:
        self.record = np.zeros(1, layout.STREAM)[0]
        self.pids = np.zeros(layout.PIDS_MAX, layout.PID)
        self.record["sync_run"] = mpegts.IN_SYNC

    def take(self, *cells: bytes, at_ns: int = 1) -> "Stream":
        memory = np.frombuffer(b"".join(cells), np.uint8).copy()
        mpegts.follow(self.record, address_of(self.pids), address_of(memory), len(memory), at_ns)
        return self

    def count(self, name: str) -> int:
        return int(self.record[name])


@pytest.mark.parametrize(
    ("cells", "errors"),
    [
        ([cell(continuity=i) for i in range(40)], 0),
        ([cell(continuity=i) for i in (0, 1, 3)], 1),
        ([cell(continuity=i) for i in (0, 1, 1, 2)], 0),
        ([cell(continuity=i) for i in (0, 1, 1, 1, 2)], 1),
        ([cell(continuity=0), cell(continuity=0, payload=False), cell(continuity=1)], 0),
        ([cell(continuity=0), cell(continuity=1, payload=False)], 1),
        ([cell(continuity=0), cell(continuity=9, discontinuity=True), cell(continuity=10)], 0),
        ([cell(continuity=0), cell(continuity=9, payload=False, discontinuity=True), cell(continuity=10)], 0),
        ([cell(pid=0x1FFF, continuity=i * 7) for i in range(5)], 0),
        ([cell(pid=1, continuity=0), cell(pid=2, continuity=8), cell(pid=1, continuity=1)], 0),
        ([cell(continuity=0), cell(continuity=5, error=True), cell(continuity=1)], 0),
    ],
    ids=[
        *("in order", "one lost", "twice", "three times", "no payload", "no payload but counted", "announced"),
        *("announced without payload", "null packets", "each PID by itself", "transport error"),
    ],
)
def test_continuity_is_judged_as_the_standard_has_it(cells: list[bytes], errors: int) -> None:
    stream = Stream().take(*cells)
    assert stream.count("continuity_errors") == errors
    assert stream.pids["continuity_errors"].sum() == errors
    assert stream.count("cells") == len(cells)


STEPS = st.lists(
    st.tuples(
        st.sampled_from([0, 17, 256, 320, 0x1FFF]),
        st.one_of(st.none(), st.integers(0, 15)),  # None: the one that is due
        st.sampled_from([True, True, True, False]),
        st.sampled_from([False, False, False, True]),
    ),
    max_size=200,
)


@settings(max_examples=200, deadline=None)
@given(steps=STEPS, cells_of_a_datagram=st.integers(1, 9))
def test_continuity_agrees_with_a_slow_model(
    steps: Sequence[tuple[int, int | None, bool, bool]], cells_of_a_datagram: int
) -> None:
    last: dict[int, tuple[int, bool]] = {}  # the last counter, and whether it was a repetition
    errors: dict[int, int] = {}
    counted: dict[int, int] = {}
    cells: list[bytes] = []
    for pid, wanted, payload, announced in steps:
        former, repeated = last.get(pid, (None, False))
        continuity = ((former or 0) + payload) % 16 if wanted is None else wanted
        cells.append(cell(pid, continuity, payload, discontinuity=announced, unit_start=len(cells) % 5 == 0))
        if pid == 0x1FFF:
            continue
        counted[pid] = counted.get(pid, 0) + 1
        is_repetition = False
        if former is not None and not (announced and continuity != (former + payload) % 16):
            if payload and continuity == former and not repeated:
                is_repetition = True
            elif continuity != (former + payload) % 16:
                errors[pid] = errors.get(pid, 0) + 1
            elif not payload:
                is_repetition = repeated
        last[pid] = continuity, is_repetition
    stream = Stream()
    for at in range(0, len(cells), cells_of_a_datagram):
        stream.take(*cells[at : at + cells_of_a_datagram])
    told = {int(pid["pid"]) - 1: int(pid["continuity_errors"]) for pid in stream.pids if pid["continuity_errors"]}
    assert told == errors
    assert {int(pid["pid"]) - 1: int(pid["cells"]) for pid in stream.pids if pid["pid"]} == counted
    assert stream.count("continuity_errors") == sum(errors.values())


def test_one_corrupted_sync_byte_loses_no_sync_two_do() -> None:
    stream = Stream().take(cell(continuity=0), cell(sync=0), cell(continuity=2))
    assert (stream.count("sync_byte_errors"), stream.count("sync_losses")) == (1, 0)
    assert stream.count("continuity_errors") == 1
    stream.take(*[cell(sync=1)] * 3)
    assert (stream.count("sync_byte_errors"), stream.count("sync_losses")) == (4, 1)
    stream.take(*[cell(continuity=i) for i in range(3, 7)])  # four are not enough
    assert stream.count("continuity_errors") == 1
    stream.take(cell(sync=1), *[cell(continuity=i) for i in range(3, 9)])
    assert (stream.count("sync_byte_errors"), stream.count("sync_losses")) == (5, 1)
    assert stream.record["sync_run"] == mpegts.IN_SYNC


def test_transport_errors_are_counted_and_nothing_else_of_the_cell_is_believed() -> None:
    stream = Stream().take(cell(pid=5), cell(pid=6, error=True))
    assert (stream.count("transport_errors"), stream.count("pids")) == (1, 1)


@pytest.mark.parametrize(
    ("after_ms", "step_ms", "announced", "gaps", "jumps"),
    [
        (40, 40, False, 0, 0),
        (100, 100, False, 0, 0),
        (101, 40, False, 1, 0),
        (40, 101, False, 0, 1),
        (40, -1, False, 0, 1),
        (40, 5000, True, 0, 0),
    ],
)
def test_pcr_is_judged_by_arrival_and_by_value(
    after_ms: int, step_ms: int, announced: bool, gaps: int, jumps: int
) -> None:
    stream = Stream()
    first = (1 << 33) * 300 - 20 * PCR_MS  # goes round
    stream.take(cell(pcr=first), at_ns=MS)
    second = (first + step_ms * PCR_MS) % ((1 << 33) * 300)
    stream.take(cell(continuity=1, pcr=second, discontinuity=announced), at_ns=MS + after_ms * MS)
    assert (stream.count("pcr_gaps"), stream.count("pcr_discontinuities")) == (gaps, jumps)


def test_bit_rate_is_that_between_clock_references() -> None:
    stream = Stream()
    for i in range(30):
        stream.take(cell(pcr=i * 40 * PCR_MS, continuity=7 * i), *[cell(continuity=7 * i + k) for k in range(1, 7)])
    assert stream.count("bits_per_second") == 7 * 188 * 8 * 25


def test_a_missing_program_association_table_is_counted() -> None:
    stream = Stream()
    for at_ms in (100, 600, 1101, 1200):
        stream.take(cell(pid=0, continuity=at_ms // 500), at_ns=at_ms * MS)
    assert stream.count("pat_gaps") == 1


def test_more_pids_than_there_is_room_for_are_counted_and_cost_no_memory() -> None:
    stream = Stream()
    for pid in range(500):
        stream.take(cell(pid=pid * 16))
    assert stream.count("pids") + stream.count("cells_untracked") == 500
    assert stream.count("pids") == (stream.pids["pid"] > 0).sum() <= layout.PIDS_MAX


@pytest.mark.parametrize("cut", [0, 1, 4, 187])
def test_what_is_no_whole_cell_is_not_read(cut: int) -> None:
    data = (cell(continuity=0) + cell(continuity=1))[: 188 + cut]
    stream = Stream().take(data)
    assert (stream.count("cells"), stream.count("malformed")) == (1, int(cut > 0))


def test_recognition_takes_ten_cells_in_whole_datagrams() -> None:
    record: Any = np.zeros(1, layout.STREAM)[0]

    def is_recognised(data: bytes) -> bool:
        memory = np.frombuffer(data, np.uint8).copy()
        return bool(mpegts.recognise(record, address_of(memory), len(data)))

    seven = cell() * 7
    assert [is_recognised(data) for data in (seven, seven[:-1], seven, seven)] == [False, False, False, True]
