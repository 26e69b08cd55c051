"""Parse: from a captured frame to a datagram, or to the cause of its drop. Pure: memory in, values out.

Reads Ethernet, up to two VLAN tags (802.1Q, 802.1ad), IPv4 with options (RFC 791) and UDP (RFC 768).
Nothing outside [frame, frame + frame_bytes) is ever read.
"""

from typing import Any

from logging_shm.atomics import int64, load_u8, load_u16, load_u32
from logging_shm.jit import compiled
from relay.dataplane.layout import VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_UDP_L4, DropCause

ETH_HLEN = 14
ETH_P_IP = 0x0800
ETH_P_8021Q = 0x8100
ETH_P_8021AD = 0x88A8
VLAN_HLEN = 4
VLAN_TAGS_MAX = 2
IPV4_HEADER_BYTES_MIN = 20
IP_FRAGMENT_MASK = 0x3FFF  # MF and the offset
IPPROTO_UDP = 17
UDP_HLEN = 8

NONE = int(DropCause.NONE)
PARSE_ERROR = int(DropCause.PARSE_ERROR)
FRAGMENT = int(DropCause.FRAGMENT)
CHECKSUM = int(DropCause.CHECKSUM)


@compiled
def be16(address: int) -> int:
    """The big-endian 16-bit number at `address`, as int64."""
    raw = int64(load_u16(address))
    return ((raw & 0xFF) << 8) | (raw >> 8)


@compiled
def be32(address: int) -> int:
    """The big-endian 32-bit number at `address`, as int64."""
    return (be16(address) << 16) | be16(address + 2)


@compiled
def ones_complement_sum(address: int, length: int) -> int:
    """RFC 1071 sum of `length` bytes at `address`, in memory byte order, folded to 16 bits."""
    total = int64(0)
    words = length >> 2
    for i in range(words):
        total += int64(load_u32(address + i * 4))
    end = address + words * 4
    if length & 2:
        total += int64(load_u16(end))
        end += 2
    if length & 1:
        total += int64(load_u8(end))
    for _ in range(4):  # 16 384 words of 32 bits fold in at most four steps
        total = (total & 0xFFFF) + (total >> 16)
    return total


@compiled
def udp_checksum_is_right(ip: int, udp: int, udp_bytes: int) -> bool:
    """Verify the UDP checksum over pseudo-header and payload; 0 in the header means none was sent."""
    if load_u16(udp + 6) == 0:
        return True
    total = ones_complement_sum(ip + 12, 8) + ones_complement_sum(udp, udp_bytes)
    total += IPPROTO_UDP << 8  # the pseudo-header's zero and protocol bytes, in memory order
    total += ((udp_bytes & 0xFF) << 8) | (udp_bytes >> 8)
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return total == 0xFFFF


@compiled
def parse(  # noqa: PLR0911 - one return a cause keeps the order of checks visible
    frame: int, frame_bytes: int, gso_type: int, gso_size: int, checksum_trusted: bool, datagram: Any
) -> int:
    """Parse the frame into `datagram` (a DATAGRAM record); return its DropCause, NONE when sound.

    `checksum_trusted`: the kernel vouches for the UDP checksum or has yet to fill it in.
    A super-frame (gso_type 5) counts `gso_size` payload bytes a datagram.
    """
    datagram.datagrams = 1
    if frame_bytes < ETH_HLEN + IPV4_HEADER_BYTES_MIN + UDP_HLEN:
        return PARSE_ERROR
    ip = frame + ETH_HLEN
    ethertype = be16(frame + 12)
    for _ in range(VLAN_TAGS_MAX):
        if ethertype in (ETH_P_8021Q, ETH_P_8021AD):
            ethertype = be16(ip + 2)
            ip += VLAN_HLEN
    packet_bytes = frame + frame_bytes - ip
    if ethertype != ETH_P_IP or packet_bytes < IPV4_HEADER_BYTES_MIN + UDP_HLEN:
        return PARSE_ERROR

    version_ihl = int64(load_u8(ip))
    header_bytes = (version_ihl & 0xF) * 4
    total_bytes = be16(ip + 2)
    if (
        version_ihl >> 4 != 4
        or header_bytes < IPV4_HEADER_BYTES_MIN
        or total_bytes < header_bytes + UDP_HLEN
        or total_bytes > packet_bytes
        or int64(load_u8(ip + 9)) != IPPROTO_UDP
    ):
        return PARSE_ERROR
    if ones_complement_sum(ip, header_bytes) != 0xFFFF:
        return CHECKSUM
    if be16(ip + 6) & IP_FRAGMENT_MASK:
        return FRAGMENT

    udp = ip + header_bytes
    udp_bytes = be16(udp + 4)
    if udp_bytes < UDP_HLEN or udp_bytes > total_bytes - header_bytes:
        return PARSE_ERROR
    payload_bytes = udp_bytes - UDP_HLEN
    segment_bytes = payload_bytes
    if gso_type == VIRTIO_NET_HDR_GSO_UDP_L4:
        if gso_size <= 0 or payload_bytes == 0:
            return PARSE_ERROR
        segment_bytes = min(gso_size, payload_bytes)
        datagram.datagrams = (payload_bytes + segment_bytes - 1) // segment_bytes
    elif gso_type != VIRTIO_NET_HDR_GSO_NONE:
        return PARSE_ERROR
    if not checksum_trusted and not udp_checksum_is_right(ip, udp, udp_bytes):
        return CHECKSUM

    datagram.ttl = int64(load_u8(ip + 8))
    datagram.src = be32(ip + 12)
    datagram.dst = be32(ip + 16)
    datagram.sport = be16(udp)
    datagram.dport = be16(udp + 2)
    datagram.segment_bytes = segment_bytes
    datagram.payload_bytes = payload_bytes
    datagram.payload = udp + UDP_HLEN
    return NONE
