"""RTP counters against a slow, obvious model, and against RFC 3550's own words."""

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.dataplane import layout, rtp

TICKS = 900  # between two datagrams, 10 ms at 90 kHz
WINDOW = rtp.MAX_MISORDER


def packet(sequence: int, timestamp: int = 0, ssrc: int = 7, payload_type: int = 33, first: int = 0x80) -> bytes:
    return struct.pack(">BBHII", first, payload_type, sequence & 0xFFFF, timestamp & 0xFFFFFFFF, ssrc) + b"x"


def raw(data: bytes) -> Any:
    return np.frombuffer(data, np.uint8).copy()


class Stream:
    """A stream that is known to be RTP, after its first datagram."""

    def __init__(self, first: int, timestamp: int = 0, payload_type: int = 33) -> None:
        self.record = np.zeros(1, layout.STREAM)[0]
        start = raw(packet(first, timestamp, payload_type=payload_type))
        rtp.begin(self.record, start.ctypes.data)
        self.received_ns = 0

    def take(self, data: bytes, after_ns: int = 10_000_000) -> int:
        memory = raw(data)
        former_ns, self.received_ns = self.received_ns, self.received_ns + after_ns
        return int(rtp.follow(self.record, memory.ctypes.data, len(memory), former_ns, self.received_ns))

    def counts(self) -> tuple[int, ...]:
        return tuple(int(self.record[name]) for name in ("rtp_lost", "rtp_reordered", "rtp_duplicates"))


@settings(max_examples=200, deadline=None)
@given(
    first=st.integers(0, 0xFFFF),
    count=st.integers(1, 400),
    lost=st.sets(st.integers(1, 399)),
    doubled=st.sets(st.integers(1, 399)),
    late=st.dictionaries(st.integers(1, 399), st.integers(1, WINDOW - 2), max_size=40),
)
def test_what_the_network_did_is_counted_exactly(
    first: int, count: int, lost: set[int], doubled: set[int], late: dict[int, int]
) -> None:
    """Each datagram is lost, doubled, or moved behind some that were sent after it."""
    arriving: list[tuple[float, int]] = []
    for i in range(1, count):
        if i in lost:
            continue
        place = i + late[i] + 0.5 if i in late else float(i)
        arriving += [(place, i)] * (2 if i in doubled else 1)
    arriving.sort()
    stream = Stream(first)
    highest, seen = 0, {0}
    reordered = duplicates = 0
    for _, i in arriving:
        duplicates += i in seen
        reordered += i < highest and i not in seen
        seen.add(i)
        highest = max(highest, i)
        stream.take(packet(first + i))
    assert stream.counts() == (highest + 1 - len(seen), reordered, duplicates)
    assert stream.record["sequence"] == first + highest


def test_sequence_numbers_go_round() -> None:
    stream = Stream(65_534)
    for i in range(65_535, 65_535 + 70_000):
        if i % 10_000:
            stream.take(packet(i))
    assert stream.counts() == (7, 0, 0)


def test_a_jump_is_a_restart_when_two_follow_each_other() -> None:
    stream = Stream(10)
    stream.take(packet(30_000))  # alone it means nothing
    stream.take(packet(11))
    assert (stream.record["sequence_restarts"], *stream.counts()) == (0, 0, 0, 0)
    for i in range(3):
        stream.take(packet(40_000 + i))
    assert (stream.record["sequence_restarts"], *stream.counts()) == (1, 0, 0, 0)
    assert stream.record["sequence"] == 40_002


@pytest.mark.parametrize("step", [2, 63, 64, 65, 127, 128, 129, 2999])
def test_gaps_of_every_width_are_lost_until_a_late_one_comes(step: int) -> None:
    stream = Stream(0)
    stream.take(packet(step))
    assert stream.counts() == (step - 1, 0, 0)
    stream.take(packet(step - 1))
    stream.take(packet(step - 1))
    assert stream.counts() == (step - 2, 1, 1)


def test_another_source_begins_anew() -> None:
    stream = Stream(10)
    stream.take(packet(5_000, ssrc=8))
    stream.take(packet(5_001, ssrc=8))
    assert (stream.record["ssrc_changes"], *stream.counts()) == (1, 0, 0, 0)


@settings(max_examples=100, deadline=None)
@given(
    steps=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 200_000_000)), min_size=1, max_size=60),
    payload_type=st.sampled_from([0, 10, 14, 33, 96, 127]),
)
def test_jitter_is_that_of_rfc_3550(steps: list[tuple[int, int]], payload_type: int) -> None:
    rate_hz = {0: 8_000, 10: 44_100, 14: 90_000, 33: 90_000, 96: 90_000, 127: 90_000}[payload_type]
    stream = Stream(1, 0xFFFF_FF00, payload_type)
    timestamp, jitter_s = 0xFFFF_FF00, 0.0
    for i, (ticks, after_ns) in enumerate(steps, 2):
        timestamp += ticks
        stream.take(packet(i, timestamp, payload_type=payload_type), after_ns)
        jitter_s += (abs(after_ns / 1e9 - ticks / rate_hz) - jitter_s) / 16
    assert stream.record["jitter_ns_16"] / 16e9 == pytest.approx(jitter_s, rel=1e-3, abs=2e-8)
    assert stream.record["jitter_ns_16_max"] >= stream.record["jitter_ns_16"]


@pytest.mark.parametrize(
    ("data", "length"),
    [
        (packet(1), 12),
        (packet(1, first=0x83) + bytes(12), 24),
        (packet(1, first=0x90)[:12] + b"\xbe\xde\x00\x01" + bytes(5), 20),
        (packet(1, first=0x90)[:12] + b"\xbe\xde\xff\xff" + bytes(5), 0),
        (packet(1, first=0x90)[:14], 0),
        (packet(1, first=0x8F), 0),
        (packet(1, first=0x40), 0),
        (packet(1, payload_type=200 & 0x7F), 0),
        (packet(1)[:11], 0),
        (b"", 0),
    ],
    ids=[
        "plain",
        "csrc",
        "extension",
        "long extension",
        "cut extension",
        "cut csrc",
        "version",
        "rtcp",
        "cut",
        "empty",
    ],
)
def test_headers_are_measured_or_refused(data: bytes, length: int) -> None:
    memory = raw(data or b"\0")
    assert rtp.header_bytes(memory.ctypes.data, len(data)) == length


@given(data=st.binary(max_size=64))
def test_a_header_is_never_longer_than_what_there_is(data: bytes) -> None:
    memory = raw(data or b"\0")
    assert 0 <= rtp.header_bytes(memory.ctypes.data, len(data)) <= len(data)
