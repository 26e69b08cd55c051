"""The health of streams, as anyone may read it from a worker's stats segment, at any time.

    with StatsSegment.attach(core, instance) as segment:
        for stream in streams(segment): …

The worker writes without a lock (relay/dataplane/streams.py): a number may be some packets older than the one beside
it, and a record that changes hands meanwhile is left out. docs/streams.md says what each number means.

It loads no NumPy: messages and commands need the structures alone.
"""

import time
from typing import TYPE_CHECKING, Any

import msgspec

from relay.addresses import endpoint, text_of

if TYPE_CHECKING:
    from relay.dataplane.counters import StatsSegment

PAYLOADS = ("udp", "rtp", "mpeg-ts", "rtp mpeg-ts")  # by layout.Payload
PAYLOAD_TYPE_MASK = 0x7F
PID_MASK = 0x1FFF


class RtpHealth(msgspec.Struct, frozen=True):
    """RFC 3550, since the stream was first seen."""

    ssrc: int
    payload_type: int
    lost: int
    reordered: int
    duplicates: int
    jitter_us: float
    jitter_max_us: float
    ssrc_changes: int
    sequence_restarts: int


class MpegTsHealth(msgspec.Struct, frozen=True):
    """ETSI TR 101 290, as far as headers tell; its packets have 188 bytes."""

    packets: int
    sync_byte_errors: int
    sync_losses: int
    transport_errors: int
    continuity_errors: int
    continuity_errors_by_pid: dict[int, int]  # of those that have any
    pids: int
    packets_untracked: int  # of PIDs beyond the limit
    pcr_gaps: int
    pcr_discontinuities: int
    pat_gaps: int
    bits_per_second: int  # by the PCR; 0: not known yet


class StreamHealth(msgspec.Struct, frozen=True, kw_only=True):
    """The datagrams of one sender to one input, as one worker took them in."""

    core: int
    ring: int
    interface: str | None = None  # known to the supervisor
    source: str  # address:port, an IPv6 address in brackets
    destination: str
    payload: str  # one of PAYLOADS
    packets: int
    bytes: int
    first_packet_ns: int  # CLOCK_MONOTONIC
    last_packet_ns: int
    silent_ms: float  # since the last packet
    gaps: int  # of 10 ms and more
    gap_last_ms: float
    gap_max_ms: float
    malformed: int  # datagrams that do not hold what the stream carries
    rtp: RtpHealth | None = None
    mpeg_ts: MpegTsHealth | None = None


class RtpTotals(msgspec.Struct, frozen=True):
    """Of all streams of a rule, also of those that have ended: since it was added, and never less than before."""

    lost: int = 0
    reordered: int = 0
    duplicates: int = 0


class MpegTsTotals(msgspec.Struct, frozen=True):
    """As RtpTotals."""

    continuity_errors: int = 0
    sync_losses: int = 0


def used_records(segment: "StatsSegment") -> Any:
    """The indices of records in use: of a copy, as NumPy refuses to count what changes meanwhile."""
    return segment.streams["number"].copy().nonzero()[0]


def streams(segment: "StatsSegment") -> list[StreamHealth]:
    """The streams of a worker. What it wrote may be anything, what is told is in range."""
    used = used_records(segment)
    records = segment.streams[used]
    pids = segment.pids[used]
    is_same = segment.streams["number"][used] == records["number"]
    now_ns, core = time.monotonic_ns(), max(int(segment.header["core"]), 0)
    return [_stream(records[i], pids[i], core, now_ns) for i in is_same.nonzero()[0]]


def _count(number: Any) -> int:
    return max(int(number), 0)


def _endpoint(record: Any, side: str, port: str) -> str:
    return endpoint(text_of(int(record[f"{side}_first"]), int(record[f"{side}_second"])), int(record[port]))


def _stream(record: Any, pids: Any, core: int, now_ns: int) -> StreamHealth:
    kind = int(record["kind"]) % len(PAYLOADS)
    payload = PAYLOADS[kind]
    return StreamHealth(
        core=core,
        ring=int(record["ring"]),
        source=_endpoint(record, "src", "sport"),
        destination=_endpoint(record, "dst", "dport"),
        payload=payload,
        packets=_count(record["packets"]),
        bytes=_count(record["bytes"]),
        first_packet_ns=_count(record["first_ns"]),
        last_packet_ns=_count(record["last_ns"]),
        silent_ms=max(now_ns - _count(record["last_ns"]), 0) / 1e6,
        gaps=_count(record["gaps"]),
        gap_last_ms=_count(record["gap_ns"]) / 1e6,
        gap_max_ms=_count(record["gap_ns_max"]) / 1e6,
        malformed=_count(record["malformed"]),
        rtp=_rtp(record) if "rtp" in payload else None,
        mpeg_ts=_mpeg_ts(record, pids) if "mpeg-ts" in payload else None,
    )


def _rtp(record: Any) -> RtpHealth:
    return RtpHealth(
        ssrc=int(record["ssrc"]),
        payload_type=int(record["payload_type"]) & PAYLOAD_TYPE_MASK,
        lost=_count(record["rtp_lost"]),
        reordered=_count(record["rtp_reordered"]),
        duplicates=_count(record["rtp_duplicates"]),
        jitter_us=_count(record["jitter_ns_16"]) / 16e3,
        jitter_max_us=_count(record["jitter_ns_16_max"]) / 16e3,
        ssrc_changes=_count(record["ssrc_changes"]),
        sequence_restarts=_count(record["sequence_restarts"]),
    )


def _mpeg_ts(record: Any, pids: Any) -> MpegTsHealth:
    wrong = pids[pids["continuity_errors"] > 0]
    return MpegTsHealth(
        packets=_count(record["cells"]),
        sync_byte_errors=_count(record["sync_byte_errors"]),
        sync_losses=_count(record["sync_losses"]),
        transport_errors=_count(record["transport_errors"]),
        continuity_errors=_count(record["continuity_errors"]),
        continuity_errors_by_pid={int(pid["pid"]) - 1 & PID_MASK: _count(pid["continuity_errors"]) for pid in wrong},
        pids=_count(record["pids"]),
        packets_untracked=_count(record["cells_untracked"]),
        pcr_gaps=_count(record["pcr_gaps"]),
        pcr_discontinuities=_count(record["pcr_discontinuities"]),
        pat_gaps=_count(record["pat_gaps"]),
        bits_per_second=_count(record["bits_per_second"]),
    )
