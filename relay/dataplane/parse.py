"""Parse: from a captured frame to a datagram, or to the cause of its drop. Pure: memory in, values out.

Reads Ethernet, up to two VLAN tags (802.1Q, 802.1ad), IPv4 with options (RFC 791), IPv6 with extension headers
(RFC 8200) and UDP (RFC 768). No jumbograms (RFC 2675): the kernel makes them of TCP alone.
Nothing outside [frame, frame + frame_bytes) is ever read.
"""

from typing import Any

from logging_shm.atomics import int64, load_i64, load_u8, load_u16, load_u32
from logging_shm.jit import compiled
from relay.dataplane.layout import VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_UDP_L4, DropCause

ETH_HLEN = 14
ETH_P_IP = 0x0800
ETH_P_IPV6 = 0x86DD
ETH_P_8021Q = 0x8100
ETH_P_8021AD = 0x88A8
VLAN_HLEN = 4
VLAN_TAGS_MAX = 2
IPV4_HEADER_BYTES_MIN = 20
IP_FRAGMENT_MASK = 0x3FFF  # MF and the offset
IPPROTO_UDP = 17
UDP_HLEN = 8
MAPPED_WORD = 0xFFFF_0000  # bytes 8 to 11 of ::ffff:0:0/96, as they are loaded
IPV6_HEADER_BYTES = 40
IPV6_ADDRESSES_BYTES = 32
NEXTHDR_HOP = 0
NEXTHDR_ROUTING = 43
NEXTHDR_FRAGMENT = 44
NEXTHDR_DEST = 60
EXTENSION_HEADERS_MAX = 8  # RFC 8200, 4.1: each once, destination options twice; who sends more is up to something
EXTENSION_BYTES_MIN = 8
IP6_FRAGMENT_MASK = 0xFFF9  # the offset and M; without both it is an atomic fragment, a whole datagram (RFC 6946)

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
def udp_checksum_is_right(ip: int, is_ipv6: bool, udp: int, udp_bytes: int) -> bool:
    """Verify the UDP checksum over pseudo-header and payload. 0 in the header means that none was sent: IPv4 may."""
    if load_u16(udp + 6) == 0:
        return not is_ipv6
    addresses, addresses_bytes = (ip + 8, IPV6_ADDRESSES_BYTES) if is_ipv6 else (ip + 12, 8)
    total = ones_complement_sum(addresses, addresses_bytes) + ones_complement_sum(udp, udp_bytes)
    total += IPPROTO_UDP << 8  # the pseudo-header's zero and protocol bytes, in memory order
    total += ((udp_bytes & 0xFF) << 8) | (udp_bytes >> 8)
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return total == 0xFFFF


@compiled
def find_udp(ip: int, packet_bytes: int) -> int:
    """How far behind the IPv4 header at `ip` the UDP header lies; the negative of a DropCause when it does not."""
    if packet_bytes < IPV4_HEADER_BYTES_MIN + UDP_HLEN:
        return -PARSE_ERROR
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
        return -PARSE_ERROR
    if ones_complement_sum(ip, header_bytes) != 0xFFFF:
        return -CHECKSUM
    if be16(ip + 6) & IP_FRAGMENT_MASK:
        return -FRAGMENT
    return header_bytes


@compiled
def is_mapped(address: int) -> bool:
    """Whether an IPv6 address is in ::ffff:0:0/96, which stands for IPv4 here and may be on no wire."""
    return load_i64(address) == 0 and load_u32(address + 8) == MAPPED_WORD


@compiled
def extension_bytes(header: int, extension: int, is_first: bool) -> int:
    """The length of an extension header that datagrams may have; the negative of a DropCause of another."""
    if header == NEXTHDR_FRAGMENT:
        return -FRAGMENT if be16(extension + 2) & IP6_FRAGMENT_MASK else EXTENSION_BYTES_MIN
    is_known = (
        header == NEXTHDR_DEST
        or (header == NEXTHDR_HOP and is_first)
        # With segments left the destination is one on the way.
        or (header == NEXTHDR_ROUTING and load_u8(extension + 3) == 0)
    )
    return (int64(load_u8(extension + 1)) + 1) * EXTENSION_BYTES_MIN if is_known else -PARSE_ERROR


@compiled
def find_udp_ipv6(ip: int, packet_bytes: int) -> int:
    """As `find_udp`, of an IPv6 header: behind at most EXTENSION_HEADERS_MAX extension headers."""
    if packet_bytes < IPV6_HEADER_BYTES + UDP_HLEN:
        return -PARSE_ERROR
    end = IPV6_HEADER_BYTES + be16(ip + 4)
    if int64(load_u8(ip)) >> 4 != 6 or end > packet_bytes or is_mapped(ip + 8) or is_mapped(ip + 24):
        return -PARSE_ERROR
    header = int64(load_u8(ip + 6))
    at = IPV6_HEADER_BYTES
    for i in range(EXTENSION_HEADERS_MAX):
        if header == IPPROTO_UDP or at + EXTENSION_BYTES_MIN > end:
            break
        passed_bytes = extension_bytes(header, ip + at, i == 0)
        if passed_bytes < 0:
            return passed_bytes
        header = int64(load_u8(ip + at))
        at += passed_bytes
    return at if header == IPPROTO_UDP and at + UDP_HLEN <= end else -PARSE_ERROR


@compiled
def take_addresses(ip: int, datagram: Any) -> None:
    """Addresses and TTL of an IPv4 header."""
    datagram.ttl = load_u8(ip + 8)
    datagram.src_first = 0
    datagram.src_second = int64(load_u32(ip + 12)) << 32 | MAPPED_WORD
    datagram.dst_first = 0
    datagram.dst_second = int64(load_u32(ip + 16)) << 32 | MAPPED_WORD


@compiled
def take_addresses_ipv6(ip: int, datagram: Any) -> None:
    """Addresses and hop limit of an IPv6 header."""
    datagram.ttl = load_u8(ip + 7)
    datagram.src_first = load_i64(ip + 8)
    datagram.src_second = load_i64(ip + 16)
    datagram.dst_first = load_i64(ip + 24)
    datagram.dst_second = load_i64(ip + 32)


@compiled
def find_ip(frame: int) -> int:
    """Where the header behind at most VLAN_TAGS_MAX tags begins; its ethertype is in the two bytes before."""
    ip = frame + ETH_HLEN
    for _ in range(VLAN_TAGS_MAX):
        if be16(ip - 2) in (ETH_P_8021Q, ETH_P_8021AD):
            ip += VLAN_HLEN
    return ip


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
    ip = find_ip(frame)
    packet_bytes = frame + frame_bytes - ip
    ethertype = be16(ip - 2)
    is_ipv6 = ethertype == ETH_P_IPV6
    if not is_ipv6 and ethertype != ETH_P_IP:
        return PARSE_ERROR
    found = find_udp_ipv6(ip, packet_bytes) if is_ipv6 else find_udp(ip, packet_bytes)
    if found < 0:
        return -found

    udp = ip + found
    left_bytes = (IPV6_HEADER_BYTES + be16(ip + 4) if is_ipv6 else be16(ip + 2)) - found
    udp_bytes = be16(udp + 4)
    if udp_bytes < UDP_HLEN or udp_bytes > left_bytes:
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
    if not checksum_trusted and not udp_checksum_is_right(ip, is_ipv6, udp, udp_bytes):
        return CHECKSUM

    if is_ipv6:
        take_addresses_ipv6(ip, datagram)
    else:
        take_addresses(ip, datagram)
    datagram.sport = be16(udp)
    datagram.dport = be16(udp + 2)
    datagram.segment_bytes = segment_bytes
    datagram.payload_bytes = payload_bytes
    datagram.payload = udp + UDP_HLEN
    return NONE
