"""What must become of a frame: a plain parser that shares nothing with the relay's, written from RFC 791 and RFC 768.

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
        ("source", "<i8"),
        ("source_port", "<i8"),
        ("destination", "<i8"),
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
    """Where the IPv4 header begins, behind at most two tags; -1 when there is none."""
    at = 12
    for _ in range(3):
        if at + 2 > length:
            return -1
        kind = number(frame, at, 2)
        if kind == 0x0800:
            return at + 2
        if kind != 0x8100 and kind != 0x88A8:
            return -1
        at += 4
    return -1


@compiled
def judge(frame: Any, length: int, gso_type: int, gso_size: int, trusted: bool, verdict: Any) -> int:
    """Fill a VERDICT for a frame that is whole, as far as the frame itself tells; return its cause."""
    verdict.datagrams = 1
    verdict.payload_bytes = 0
    ip = ip_offset(frame, length)
    if ip < 0 or length - ip < 28:
        return PARSE_ERROR
    header = (int64(frame[ip]) % 16) * 4
    total = number(frame, ip + 2, 2)
    if int64(frame[ip]) // 16 != 4 or header < 20 or frame[ip + 9] != 17:
        return PARSE_ERROR
    if total > length - ip or total < header + 8:
        return PARSE_ERROR
    if not is_right(words_sum(frame, ip, ip + header)):
        return CHECKSUM
    if number(frame, ip + 6, 2) % 0x4000 != 0:
        return FRAGMENT
    udp = ip + header
    size = number(frame, udp + 4, 2)
    if size < 8 or size > total - header:
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
    if not trusted and number(frame, udp + 6, 2) != 0:
        pseudo_header = words_sum(frame, ip + 12, ip + 20) + 17 + size
        if not is_right(pseudo_header + words_sum(frame, udp, udp + size)):
            return CHECKSUM
    verdict.payload = udp + 8
    verdict.payload_bytes = payload_bytes
    verdict.segment_bytes = segment_bytes
    verdict.ttl = frame[ip + 8]
    verdict.source = number(frame, ip + 12, 4)
    verdict.destination = number(frame, ip + 16, 4)
    verdict.source_port = number(frame, udp, 2)
    verdict.destination_port = number(frame, udp + 2, 2)
    return NONE
