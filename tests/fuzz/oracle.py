"""What must become of a frame: a plain parser that shares nothing with the relay's, from RFC 791, RFC 8200 and RFC 768.

It is called on copies that the relay never sees. Compiled, as it judges ten million frames; test_packets.py compares it
with what scapy builds. `frame` is u1[n], `length` says how much of it is the frame.
"""

from typing import Any

import numpy as np

from logging_shm.atomics import int64
from logging_shm.jit import compiled

NONE, TRUNCATED, PARSE_ERROR, FRAGMENT, CHECKSUM, NO_MATCH, OWN_EGRESS = range(7)

VERDICT = np.dtype(
    [
        ("cause", "<i8"),
        ("datagrams", "<i8"),
        ("payload", "<i8"),  # its offset in the frame
        ("payload_bytes", "<i8"),
        ("segment_bytes", "<i8"),
        ("ttl", "<i8"),
        ("version", "<i8"),  # 4 or 6
        ("source", "<i8"),  # of IPv6 the first half, and the second
        ("source_rest", "<i8"),
        ("source_port", "<i8"),
        ("destination", "<i8"),
        ("destination_rest", "<i8"),
        ("destination_port", "<i8"),
    ]
)


@compiled
def number(frame: Any, at: int, count: int) -> int:
    """The big-endian number in `count` bytes."""
    value = int64(0)
    for i in range(count):
        value = value * 256 + int64(frame[at + i])
    return value


@compiled
def words_sum(frame: Any, first: int, end: int) -> int:
    """The sum of the big-endian 16-bit words from `first` up to `end`, an odd last byte filled up with 0."""
    total = int64(0)
    for at in range(first, end, 2):
        total += int64(frame[at]) * 256
        if at + 1 < end:
            total += int64(frame[at + 1])
    return total


@compiled
def is_right(total: int) -> bool:
    """Whether a sum that includes its own checksum is all ones."""
    while total > 0xFFFF:
        total = total % 0x10000 + total // 0x10000
    return total == 0xFFFF


@compiled
def ip_offset(frame: Any, length: int) -> int:
    """Where the IP header begins, behind at most two tags; -1 when there is none."""
    at = 12
    for _ in range(3):
        if at + 2 > length:
            return -1
        kind = number(frame, at, 2)
        if kind == 0x0800 or kind == 0x86DD:
            return at + 2
        if kind != 0x8100 and kind != 0x88A8:
            return -1
        at += 4
    return -1


@compiled
def find_udp(frame: Any, length: int, ip: int) -> int:
    """Where the UDP header of IPv4 begins, or the negative of what is wrong."""
    if length - ip < 28:
        return -PARSE_ERROR
    header = (int64(frame[ip]) % 16) * 4
    total = number(frame, ip + 2, 2)
    if int64(frame[ip]) // 16 != 4 or header < 20 or frame[ip + 9] != 17:
        return -PARSE_ERROR
    if total > length - ip or total < header + 8:
        return -PARSE_ERROR
    if not is_right(words_sum(frame, ip, ip + header)):
        return -CHECKSUM
    if number(frame, ip + 6, 2) % 0x4000 != 0:
        return -FRAGMENT
    return ip + header


@compiled
def find_udp6(frame: Any, length: int, ip: int) -> int:
    """The same of IPv6: at most eight extension headers."""
    if length - ip < 48:
        return -PARSE_ERROR
    end = ip + 40 + number(frame, ip + 4, 2)
    if int64(frame[ip]) // 16 != 6 or end > length:
        return -PARSE_ERROR
    for address in (ip + 8, ip + 24):
        if number(frame, address, 8) == 0 and number(frame, address + 8, 4) == 0xFFFF:
            return -PARSE_ERROR
    kind, at, seen = int64(frame[ip + 6]), ip + 40, 0
    while kind != 17:
        if seen == 8 or at + 8 > end:
            return -PARSE_ERROR
        following = int64(frame[at])
        if kind == 44:
            if number(frame, at + 2, 2) // 8 or frame[at + 3] % 2:
                return -FRAGMENT
            at += 8
        elif kind == 60 or (kind == 0 and seen == 0) or (kind == 43 and frame[at + 3] == 0):
            at += 8 * (int64(frame[at + 1]) + 1)
        else:
            return -PARSE_ERROR
        kind = following
        seen += 1
    return at if at + 8 <= end else -PARSE_ERROR


@compiled
def udp_sum(frame: Any, ip: int, udp: int, size: int) -> int:
    """The sum of a datagram with its pseudo-header."""
    is_six = frame[ip] // 16 == 6
    addresses = words_sum(frame, ip + 8, ip + 40) if is_six else words_sum(frame, ip + 12, ip + 20)
    return addresses + 17 + size + words_sum(frame, udp, udp + size)


@compiled
def judge(frame: Any, length: int, gso_type: int, gso_size: int, trusted: bool, verdict: Any) -> int:
    """Fill a VERDICT for a frame that is whole, as far as the frame itself tells; return its cause."""
    verdict.datagrams = 1
    verdict.payload_bytes = 0
    ip = ip_offset(frame, length)
    if ip < 0:
        return PARSE_ERROR
    is_six = number(frame, ip - 2, 2) == 0x86DD
    udp = find_udp6(frame, length, ip) if is_six else find_udp(frame, length, ip)
    if udp < 0:
        return -udp
    end = ip + 40 + number(frame, ip + 4, 2) if is_six else ip + number(frame, ip + 2, 2)
    size = number(frame, udp + 4, 2)
    if size < 8 or size > end - udp:
        return PARSE_ERROR
    payload_bytes = size - 8
    segment_bytes = payload_bytes
    if gso_type == 5:
        if gso_size == 0 or payload_bytes == 0:
            return PARSE_ERROR
        segment_bytes = min(gso_size, payload_bytes)
        verdict.datagrams = -(-payload_bytes // segment_bytes)
    elif gso_type != 0:
        return PARSE_ERROR
    if not trusted:
        is_sent = number(frame, udp + 6, 2) != 0
        if (is_sent and not is_right(udp_sum(frame, ip, udp, size))) or (is_six and not is_sent):
            return CHECKSUM
    verdict.payload = udp + 8
    verdict.payload_bytes = payload_bytes
    verdict.segment_bytes = segment_bytes
    verdict.source_port = number(frame, udp, 2)
    verdict.destination_port = number(frame, udp + 2, 2)
    verdict.source_rest = verdict.destination_rest = 0
    if is_six:
        verdict.version = 6
        verdict.ttl = frame[ip + 7]
        verdict.source = number(frame, ip + 8, 8)
        verdict.source_rest = number(frame, ip + 16, 8)
        verdict.destination = number(frame, ip + 24, 8)
        verdict.destination_rest = number(frame, ip + 32, 8)
        return NONE
    verdict.version = 4
    verdict.ttl = frame[ip + 8]
    verdict.source = number(frame, ip + 12, 4)
    verdict.destination = number(frame, ip + 16, 4)
    return NONE
