"""RTP: what a stream's sequence numbers and timestamps tell of the network before the relay. RFC 3550.

Pure: an RTP header in memory and a STREAM record in, counters in that record out. Sequence numbers are followed as in
appendix A.1, jitter as in A.8, but in nanoseconds. Of the last 128 datagrams it is known which have not come, so that a
late one is told from one that comes twice, and what is lost is exact: late datagrams are not.
"""

from typing import Any

from logging_shm.atomics import int64, load_u8, load_u32
from logging_shm.jit import compiled
from relay.dataplane.parse import be16, be32

HEADER_BYTES = 12
CSRC_BYTES = 4
EXTENSION_BYTES = 4
VERSION_MASK, VERSION_2 = 0xC0, 0x80
EXTENSION = 0x10
CSRC_COUNT = 0x0F
PAYLOAD_TYPE = 0x7F
RTCP_FIRST, RTCP_LAST = 72, 76  # RTCP packet types 200 to 204 read as payload types, RFC 3551 table 6
MAX_DROPOUT = 3000  # RFC 3550 A.1
MAX_MISORDER = 100
RECOGNISED_AFTER = 4  # datagrams in sequence
FORGOTTEN_AFTER = 64  # datagrams in a row that are no RTP
TICKS_MAX = 1 << 24  # 186 s at 90 kHz: a larger step of the timestamp is a new beginning
NS_16 = 1_000_000_000 << 16
UNKNOWN = -1
VIDEO_HZ = 90_000  # also of what is dynamic, RFC 3551 section 5
FIRST_DYNAMIC = 96

# RFC 3551 tables 4 and 5: clock rates of static payload types. 0: unassigned.
_RATES_HZ = {
    **dict.fromkeys((0, 3, 4, 5, 7, 8, 9, 12, 13, 15, 18), 8_000),
    **dict.fromkeys((10, 11), 44_100),
    6: 16_000,
    16: 11_025,
    17: 22_050,
    **dict.fromkeys((14, 25, 26, 28, 31, 32, 33, 34), VIDEO_HZ),
    **dict.fromkeys(range(FIRST_DYNAMIC, 128), VIDEO_HZ),
}
TICK_NS_16 = tuple(NS_16 // _RATES_HZ[number] if number in _RATES_HZ else 0 for number in range(128))


@compiled
def header_bytes(payload: int, payload_bytes: int) -> int:
    """The length of the RTP header that `payload` begins with; 0 when it is none. RFC 3550 section 5.1."""
    if payload_bytes < HEADER_BYTES:
        return 0
    first = int64(load_u8(payload))
    payload_type = int64(load_u8(payload + 1)) & PAYLOAD_TYPE
    if first & VERSION_MASK != VERSION_2 or RTCP_FIRST <= payload_type <= RTCP_LAST:
        return 0
    length = HEADER_BYTES + CSRC_BYTES * (first & CSRC_COUNT)
    if first & EXTENSION:
        if length + EXTENSION_BYTES > payload_bytes:
            return 0
        length += EXTENSION_BYTES + 4 * be16(payload + length + 2)
    return length if length <= payload_bytes else 0


@compiled
def follow(stream: Any, payload: int, payload_bytes: int, former_ns: int, received_ns: int) -> int:
    """Take an RTP datagram into a STREAM that carries RTP; return its header's length, 0 when it is no RTP.

    `former_ns` is the receive time of the datagram before.
    """
    length = header_bytes(payload, payload_bytes)
    if length == 0:
        stream.malformed += 1
        stream.misfits += 1
        stream.timestamp = UNKNOWN
        return 0
    stream.misfits = 0
    if int64(load_u32(payload + 8)) != stream.ssrc:
        stream.ssrc_changes += 1
        begin(stream, payload)
        return length
    payload_type = int64(load_u8(payload + 1)) & PAYLOAD_TYPE
    if payload_type != stream.payload_type:
        begin_clock(stream, payload_type)
    if follow_sequence(stream, be16(payload + 2)):
        follow_timestamp(stream, be32(payload + 4), former_ns, received_ns)
    return length


@compiled
def looks_like_next(stream: Any, payload: int) -> bool:
    """Whether the RTP header follows the one that was seen before."""
    return (
        int64(load_u32(payload + 8)) == stream.ssrc
        and int64(load_u8(payload + 1)) & PAYLOAD_TYPE == stream.payload_type
        and be16(payload + 2) == (stream.sequence + 1) & 0xFFFF
    )


@compiled
def recognise(stream: Any, payload: int, former_ns: int, received_ns: int) -> bool:
    """Take a datagram with an RTP header into a STREAM of unknown content; whether enough have come in sequence."""
    if stream.rtp_run and looks_like_next(stream, payload):
        stream.rtp_run += 1
        stream.sequence += 1
        follow_timestamp(stream, be32(payload + 4), former_ns, received_ns)
        return bool(stream.rtp_run >= RECOGNISED_AFTER)
    stream.rtp_run = 1
    begin(stream, payload)
    stream.timestamp = be32(payload + 4)
    return False


@compiled
def begin(stream: Any, payload: int) -> None:
    """Begin with this datagram's sequence number, source and clock."""
    stream.ssrc = load_u32(payload + 8)
    begin_clock(stream, int64(load_u8(payload + 1)) & PAYLOAD_TYPE)
    begin_sequence(stream, be16(payload + 2))
    stream.timestamp = be32(payload + 4)


@compiled
def begin_clock(stream: Any, payload_type: int) -> None:
    """Go over to the clock of a payload type."""
    stream.payload_type = payload_type
    stream.tick_ns_16 = TICK_NS_16[payload_type]
    stream.timestamp = UNKNOWN


@compiled
def begin_sequence(stream: Any, sequence: int) -> None:
    """Nothing is known of sequence numbers before this one."""
    stream.sequence = stream.sequence_first = sequence
    stream.missing_low = stream.missing_high = 0
    stream.bad_sequence = UNKNOWN


@compiled
def follow_sequence(stream: Any, sequence: int) -> bool:
    """Follow the sequence number; False for one that is so far away that it may mean nothing."""
    step = (sequence - stream.sequence) & 0xFFFF
    if step == 1 and stream.missing_low | stream.missing_high == 0:
        stream.sequence += 1
        return True
    if step == 0:
        stream.rtp_duplicates += 1
    elif step < MAX_DROPOUT:
        advance(stream, step)
    elif step > 0x10000 - MAX_MISORDER:
        take_late(stream, 0x10000 - step)
    elif sequence == stream.bad_sequence:  # two in sequence: the sender has begun anew
        stream.sequence_restarts += 1
        begin_sequence(stream, sequence)
        stream.timestamp = UNKNOWN
    else:
        stream.bad_sequence = (sequence + 1) & 0xFFFF
        return False
    return True


@compiled
def advance(stream: Any, step: int) -> None:
    """Go on by `step` sequence numbers, of which the last has come."""
    low, high = int64(stream.missing_low), int64(stream.missing_high)
    if step >= 128:
        low, high = int64(-2), int64(-1)  # all but the last
    elif step >= 64:
        skipped = (int64(1) << (step - 64)) - 1
        high = low << (step - 64) | skipped
        low = int64(-2)
    else:
        carried = low >> (64 - step) & ((int64(1) << step) - 1)
        high = high << step | carried
        low = low << step | ((int64(1) << step) - 2)
    stream.missing_low = low
    stream.missing_high = high
    stream.sequence += step
    stream.rtp_lost += step - 1


@compiled
def take_late(stream: Any, back: int) -> None:
    """Take a datagram that is `back` behind the highest: late, or there for the second time."""
    if back > stream.sequence - stream.sequence_first:  # before the first: was never missed
        stream.rtp_reordered += 1
        return
    bit = int64(1) << (back & 63)
    missing = int64(stream.missing_low) if back < 64 else int64(stream.missing_high)
    if missing & bit == 0:
        stream.rtp_duplicates += 1
        return
    if back < 64:
        stream.missing_low = missing & ~bit
    else:
        stream.missing_high = missing & ~bit
    stream.rtp_reordered += 1
    stream.rtp_lost -= 1


@compiled
def follow_timestamp(stream: Any, timestamp: int, former_ns: int, received_ns: int) -> None:
    """Interarrival jitter, RFC 3550 6.4.1 and A.8: the difference of transit times, a sixteenth of it each time."""
    former = int64(stream.timestamp)
    stream.timestamp = timestamp
    ticks = ((timestamp - former + 0x8000_0000) & 0xFFFF_FFFF) - 0x8000_0000
    if former == UNKNOWN or stream.tick_ns_16 == 0 or abs(ticks) > TICKS_MAX:
        return
    difference_ns = abs(received_ns - former_ns - (ticks * stream.tick_ns_16 >> 16))
    jitter = stream.jitter_ns_16 + difference_ns - ((stream.jitter_ns_16 + 8) >> 4)
    stream.jitter_ns_16 = jitter
    stream.jitter_ns_16_max = max(stream.jitter_ns_16_max, jitter)
