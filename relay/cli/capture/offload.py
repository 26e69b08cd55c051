"""Offload: from a frame as a tap sees it to the frames that a wire carries. Pure.

A host hands a network card many datagrams as one frame with one header, and leaves checksums to the card; a tap sees
what was handed over. Here it is done as the card does it. Source: linux/virtio_net.h, RFC 768, RFC 1071, RFC 8200.
"""

import struct
from collections.abc import Iterator
from mmap import mmap
from typing import NamedTuple

ETH_P_8021Q = 0x8100
ETH_P_8021AD = 0x88A8
ETH_HLEN = 14
VLAN_HLEN = 4
UDP_HEADER_BYTES = 8
IPV6_HEADER_BYTES = 40
VIRTIO_NET_HDR_F_NEEDS_CSUM = 1
VIRTIO_NET_HDR_GSO_UDP_L4 = 5
VIRTIO_NET_HDR_GSO_ECN = 0x80

_VIRTIO = struct.Struct("<BBHHHH")


class VirtioNetHdr(NamedTuple):
    """struct virtio_net_hdr: what the host left to do."""

    flags: int = 0
    gso_type: int = 0
    hdr_len: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0


def read_virtio(buffer: bytes | mmap, end: int) -> VirtioNetHdr:
    """The header that ends at `end`: it lies before the frame in a packet ring."""
    return VirtioNetHdr(*_VIRTIO.unpack_from(buffer, end - _VIRTIO.size))


def checksum(data: bytes) -> int:
    """The Internet checksum: the complement of the ones' complement sum, which is a remainder by 65 535."""
    if len(data) % 2:
        data += b"\0"
    return 0xFFFF - int.from_bytes(data, "big") % 0xFFFF


def _ip_offset(frame: bytes) -> int:
    at = ETH_HLEN
    while int.from_bytes(frame[at - 2 : at], "big") in (ETH_P_8021Q, ETH_P_8021AD):
        at += VLAN_HLEN
    return at


def _udp_checksum(addresses: bytes, datagram: bytes) -> int:
    """Of a datagram whose checksum field is 0; `addresses` are source and destination."""
    pseudo_header = addresses + struct.pack(">BBH", 0, 17, len(datagram))
    return checksum(pseudo_header + datagram) or 0xFFFF  # 0 means none: RFC 768


def on_the_wire(frame: bytes, left: VirtioNetHdr) -> Iterator[bytes]:
    """The frames that leave, or came, when all is done that was left to do."""
    if left.gso_type & ~VIRTIO_NET_HDR_GSO_ECN == VIRTIO_NET_HDR_GSO_UDP_L4 and left.gso_size:
        yield from _segments(frame, left.gso_size, left.csum_start)
    elif left.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM:
        yield _with_checksum(frame, left.csum_start, left.csum_start + left.csum_offset)
    else:
        yield frame


def _with_checksum(frame: bytes, start: int, at: int) -> bytes:
    """The field at `at` holds the sum of the pseudo-header, and is part of what is summed."""
    if at + 2 > len(frame):
        return frame
    return b"".join((frame[:at], struct.pack(">H", checksum(frame[start:]) or 0xFFFF), frame[at + 2 :]))


def _segments(frame: bytes, segment_bytes: int, csum_start: int) -> Iterator[bytes]:
    ip = _ip_offset(frame)
    if frame[ip] >> 4 == 6:
        yield from _segments_ipv6(frame, ip, max(csum_start, ip + IPV6_HEADER_BYTES), segment_bytes)
        return
    udp = ip + (frame[ip] & 0x0F) * 4
    payload = udp + UDP_HEADER_BYTES
    link, ports, addresses = frame[:ip], frame[udp : udp + 4], frame[ip + 12 : ip + 20]
    header = bytearray(frame[ip:udp])
    (first_id,) = struct.unpack_from(">H", header, 4)
    for number, at in enumerate(range(payload, len(frame), segment_bytes)):
        data = frame[at : at + segment_bytes]
        length = UDP_HEADER_BYTES + len(data)
        struct.pack_into(">HH", header, 2, len(header) + length, (first_id + number) & 0xFFFF)
        struct.pack_into(">H", header, 10, 0)
        struct.pack_into(">H", header, 10, checksum(bytes(header)))
        total = _udp_checksum(addresses, b"".join((ports, struct.pack(">HH", length, 0), data)))
        yield b"".join((link, header, ports, struct.pack(">HH", length, total), data))


def _segments_ipv6(frame: bytes, ip: int, udp: int, segment_bytes: int) -> Iterator[bytes]:
    """The same for IPv6, whose header has no sum of its own; extension headers are each datagram's."""
    payload = udp + UDP_HEADER_BYTES
    link, ports, addresses = frame[:ip], frame[udp : udp + 4], frame[ip + 8 : ip + 40]
    header = bytearray(frame[ip:udp])
    for at in range(payload, len(frame), segment_bytes):
        data = frame[at : at + segment_bytes]
        length = UDP_HEADER_BYTES + len(data)
        struct.pack_into(">H", header, 4, len(header) - IPV6_HEADER_BYTES + length)
        total = _udp_checksum(addresses, b"".join((ports, struct.pack(">HH", length, 0), data)))
        yield b"".join((link, header, ports, struct.pack(">HH", length, total), data))


def with_tag(frame: bytes, tpid: int, tci: int) -> bytes:
    """Put back a VLAN tag that the kernel took out."""
    return b"".join((frame[:12], struct.pack(">HH", tpid, tci), frame[12:]))
