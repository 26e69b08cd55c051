"""The payload of test traffic, defined once for sender and receiver.

A datagram carries a HEADER, at its beginning or behind what makes it look like RTP or MPEG-TS, and a checksum
over all of it, so that the receiver knows what was lost, doubled, reordered or altered. Datagrams that have no
room for a header are counted and no more.
"""

from typing import Any, Final

import numpy as np
from numba import njit

from logging_shm.atomics import int64, load_i64, load_u8, load_u32, store_i64, store_u8, store_u32

MAGIC: Final = 0x5452434D  # "MCRT"
HEADER: Final = np.dtype(
    [
        ("magic", "<u4"),
        ("flow", "<u4"),
        ("sequence", "<i8"),
        ("send_ns", "<i8"),  # CLOCK_REALTIME
        ("run", "<u4"),  # tells one run of the sender from the next
        ("checksum", "<u4"),
    ]
)
HEADER_BYTES: Final = HEADER.itemsize

SEQ: Final = 0
RTP: Final = 1
TS: Final = 2
RANDOM: Final = 3
KINDS: Final = {"seq": SEQ, "rtp": RTP, "ts": TS, "random": RANDOM}
HEADER_OFFSET: Final = {SEQ: 0, RTP: 12, TS: 4, RANDOM: 0}
RTP_PAYLOAD_TYPE: Final = 33  # MP2T, RFC 3551
TS_PACKET_BYTES: Final = 188
TS_SYNC: Final = 0x47
TS_PID: Final = 0x100


@njit(cache=True, nogil=True)
def checksum(payload: int, length: int, at: int) -> int:
    """A 32-bit sum of `length` bytes at address `payload`, each word weighed by its place; `at` counts as 0.

    `at` is the offset of the header's checksum, which is not a part of the sum.
    """
    total = int64(0)
    words = length >> 2
    for i in range(words):
        total += (int64(load_u32(payload + i * 4)) * (2 * i + 1)) & 0xFFFFFFFF
    total -= (int64(load_u32(payload + at)) * (2 * (at >> 2) + 1)) & 0xFFFFFFFF
    for i in range(words * 4, length):
        total += int64(load_u8(payload + i)) << (i & 3)
    return total & 0xFFFFFFFF


@njit(cache=True, nogil=True)
def store_be16(address: int, value: int) -> None:
    """Store `value` big-endian."""
    store_u8(address, (value >> 8) & 0xFF)
    store_u8(address + 1, value & 0xFF)


@njit(cache=True, nogil=True)
def fill(payload: int, length: int, kind: int, offset: int, flow: int, sequence: int, now_ns: int, run: int) -> None:
    """Write everything that differs from datagram to datagram; `offset` is the header's."""
    if length < offset + HEADER_BYTES:
        return
    if kind == RTP:
        store_u8(payload, 0x80)
        store_u8(payload + 1, RTP_PAYLOAD_TYPE)
        store_be16(payload + 2, sequence & 0xFFFF)
        timestamp = (now_ns * 9 // 100_000) & 0xFFFFFFFF  # 90 kHz
        store_be16(payload + 4, timestamp >> 16)
        store_be16(payload + 6, timestamp)
        store_be16(payload + 8, flow >> 16)
        store_be16(payload + 10, flow)
    elif kind == TS:
        packets = length // TS_PACKET_BYTES
        for i in range(packets):
            packet = payload + i * TS_PACKET_BYTES
            store_u8(packet, TS_SYNC)
            store_be16(packet + 1, TS_PID)
            store_u8(packet + 3, 0x10 | ((sequence * packets + i) & 0xF))
    header = payload + offset
    store_u32(header, MAGIC)
    store_u32(header + 4, flow)
    store_i64(header + 8, sequence)
    store_i64(header + 16, now_ns)
    store_u32(header + 24, run)
    store_u32(header + 28, checksum(payload, length, offset + 28))


@njit(cache=True, nogil=True)
def find_header(payload: int, length: int) -> int:
    """The offset of the header, -1 when there is none."""
    for offset in (0, 12, 4):
        if length >= offset + HEADER_BYTES and int64(load_u32(payload + offset)) == MAGIC:
            return offset
    return -1


@njit(cache=True, nogil=True)
def is_intact(payload: int, length: int, offset: int) -> bool:
    """Whether the checksum of a payload with a header at `offset` is right."""
    return int64(load_u32(payload + offset + 28)) == checksum(payload, length, offset + 28)


@njit(cache=True, nogil=True)
def send_time_ns(payload: int, offset: int) -> int:
    """When the datagram was sent."""
    return load_i64(payload + offset + 16)


def template(kind: int, length: int, seed: int) -> Any:
    """The bytes that stay the same: a pattern, or noise for `random`; u1[length]."""
    if kind == RANDOM:
        return np.random.default_rng(seed).integers(0, 256, length, np.uint8)
    return (np.arange(length, dtype=np.int64) * 31 % 251).astype(np.uint8)
