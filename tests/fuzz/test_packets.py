"""Frames of every kind of damage through the compiled data path: relayed unaltered, or dropped under one cause.

MCR_FUZZ_FRAMES (default 200 000; the long run has 10 000 000) says how many, MCR_FUZZ_SEED which; `--minutes` how long
instead. The frames are relayed in a child process, see datapath.py: a byte read beside a frame kills it.
"""

import signal
import socket
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP, IPOption
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrRouting
from scapy.layers.l2 import Dot1AD, Dot1Q
from scapy.packet import Packet, Raw

from relay.dataplane.copies import COPY_SLOT_BYTES
from relay.dataplane.layout import DropCause
from tests.fuzz import children, oracle
from tests.fuzz.datapath import DataPath
from tests.fuzz.frames import (
    BIG_BYTES_MAX,
    ETHERNET,
    GROUPS6,
    META,
    TP_STATUS_COPY,
    TP_STATUS_USER,
    as_array,
    big_frames,
    datagram,
    datagram6,
)

FRAMES = children.count("MCR_FUZZ_FRAMES", 200_000)
SEED = children.count("MCR_FUZZ_SEED", 1)


def explain(ended: children.Ended, tmp_path: Path) -> str:
    """What is wrong with which frame: after a crash, the pass is repeated frame by frame."""
    if ended.status >= 0 and not ended.stalled:
        return ended.output
    number = ended.progress.number
    again = children.run("datapath", "--seed", str(SEED), "--only-pass", str(number), progress=tmp_path / "again")
    how = "no progress any more" if ended.stalled else signal.Signals(-ended.status).name
    return f"{how} in pass {number} of seed {SEED}, repeated: {again.status}, {again.progress.what}\n{ended.output}"


def test_every_frame_is_relayed_unaltered_or_counted_under_one_cause(tmp_path: Path, fuzz_seconds: float) -> None:
    how_much = ("--seconds", str(fuzz_seconds)) if fuzz_seconds else ("--frames", str(FRAMES))
    ended = children.run("datapath", "--seed", str(SEED), *how_much, progress=tmp_path / "progress")
    assert ended.status == 0, explain(ended, tmp_path)
    print(ended.output)


def test_a_byte_read_behind_a_frame_is_seen(tmp_path: Path) -> None:
    """The ring claims more bytes than there are before the inaccessible page: this is what the other test would see."""
    ended = children.run("datapath", "--seed", "1", "--overrun", progress=tmp_path / "progress")
    assert ended.status == -signal.SIGSEGV, ended.output


def test_a_frame_larger_than_the_copy_arena_costs_only_itself() -> None:
    """The copies of those behind it are still told to belong to their slots."""
    big = [frame for frame in big_frames() if len(frame) > COPY_SLOT_BYTES or len(frame) < 10_000]
    big = [big[-1], *big[:-1]]
    made, lengths = as_array(big, BIG_BYTES_MAX)
    metas = np.zeros(len(big), META)
    metas["length"] = metas["tp_len"] = lengths
    metas["status"] = TP_STATUS_USER | TP_STATUS_COPY
    path = DataPath(SEED)
    try:
        for number in range(3):
            path.check(number, made, metas, np.ones(len(big), np.uint8))
        assert path.drops[DropCause.TRUNCATED] == 3
    finally:
        path.close()


def judged(frame: bytes) -> tuple[int, np.void]:
    verdict = np.zeros(1, oracle.VERDICT)
    cause = oracle.judge(np.frombuffer(frame, np.uint8), len(frame), 0, 0, False, verdict[0])
    return cause, verdict[0]


TAGS = st.lists(st.sampled_from((Dot1Q(vlan=5), Dot1AD(vlan=7))), max_size=3)


@settings(max_examples=100)
@given(
    tags=TAGS,
    payload=st.binary(max_size=300),
    padding=st.integers(0, 20),
    options=st.integers(0, 10),
    ttl=st.integers(0, 255),
    sport=st.integers(0, 65_535),
)
def test_the_oracle_reads_what_scapy_writes(
    tags: list[Packet], payload: bytes, padding: int, options: int, ttl: int, sport: int
) -> None:
    packet = ETHERNET
    for tag in tags:
        packet = packet / tag
    inner = [IPOption(b"\x01" * (4 * options))] if options else []
    packet = packet / datagram(payload, sport=sport, ttl=ttl, options=inner)
    frame = bytes(packet) + bytes(padding)
    cause, verdict = judged(frame)
    if len(tags) > 2:
        assert cause == oracle.PARSE_ERROR
        return
    assert cause == oracle.NONE
    assert frame[verdict["payload"] :][: verdict["payload_bytes"]] == payload
    assert (verdict["ttl"], verdict["source_port"], verdict["destination_port"]) == (ttl, sport, 5001)
    assert verdict["destination"] == 0xEF010101


EXTENSIONS = st.sampled_from(
    (IPv6ExtHdrDestOpt(), IPv6ExtHdrRouting(segleft=0, addresses=["2001:db8::9"]), IPv6ExtHdrFragment(offset=0, m=0))
)


@settings(max_examples=100)
@given(
    payload=st.binary(max_size=300),
    padding=st.integers(0, 20),
    extensions=st.lists(EXTENSIONS, max_size=9),
    hops=st.integers(0, 255),
    sport=st.integers(0, 65_535),
)
def test_the_oracle_reads_what_scapy_writes_of_ipv6(
    payload: bytes, padding: int, extensions: list[Packet], hops: int, sport: int
) -> None:
    frame = bytes(ETHERNET / datagram6(payload, *extensions, sport=sport, hops=hops)) + bytes(padding)
    cause, verdict = judged(frame)
    if len(extensions) > 8:
        assert cause == oracle.PARSE_ERROR
        return
    assert cause == oracle.NONE
    assert frame[verdict["payload"] :][: verdict["payload_bytes"]] == payload
    assert (verdict["ttl"], verdict["source_port"], verdict["destination_port"]) == (hops, sport, 5001)
    told = struct.pack(">qq", verdict["destination"], verdict["destination_rest"])
    assert socket.inet_ntop(socket.AF_INET6, told) == GROUPS6[0]


@pytest.mark.parametrize(
    ("packet", "cause"),
    [
        (datagram6(b"x", IPv6ExtHdrFragment(offset=0, m=1)), oracle.FRAGMENT),
        (datagram6(b"x", IPv6ExtHdrRouting(segleft=1, addresses=["2001:db8::9"])), oracle.PARSE_ERROR),
        (IPv6(dst="ff3e::1") / UDP(dport=5001, chksum=0) / Raw(b"x"), oracle.CHECKSUM),
        (IPv6(src="::ffff:10.0.0.1", dst="ff3e::1") / UDP(dport=5001) / Raw(b"x"), oracle.PARSE_ERROR),
        (datagram(b"x", version=6), oracle.PARSE_ERROR),
        (datagram(b"x", proto=6), oracle.PARSE_ERROR),
        (datagram(b"x", len=40), oracle.PARSE_ERROR),
        (datagram(b"x", chksum=1), oracle.CHECKSUM),
        (datagram(b"x", flags="MF"), oracle.FRAGMENT),
        (datagram(b"x", frag=1), oracle.FRAGMENT),
        (IP(dst="239.1.1.1") / UDP(dport=5001, len=7) / Raw(b"x"), oracle.PARSE_ERROR),
        (IP(dst="239.1.1.1") / UDP(dport=5001, chksum=1) / Raw(b"x"), oracle.CHECKSUM),
    ],
)
def test_the_oracle_knows_what_is_wrong(packet: Packet, cause: int) -> None:
    assert judged(bytes(ETHERNET / packet))[0] == cause
