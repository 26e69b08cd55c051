"""Frames as no sender makes them: sound ones that scapy builds, changed in compiled code.

A change knows where the fields are, and often puts the checksums right again, so that what is wrong is found as far
down the path as can be. The kernel's own words about a frame (status, lengths, virtio header) are made up, too, within
what packet_rcv can say: net/packet/af_packet.c.
"""

from typing import Any

import numpy as np
from scapy.layers.inet import IP, UDP, IPOption
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop, IPv6ExtHdrRouting
from scapy.layers.l2 import Dot1AD, Dot1Q, Ether
from scapy.packet import Packet, Raw

from logging_shm.jit import compiled
from tests.fuzz.oracle import find_udp6, ip_offset, number, udp_sum, words_sum

FRAME_BYTES_MAX = 3968  # leaves room for all that the kernel writes before it
BIG_BYTES_MAX = 80_000  # a jumbo or super-frame; the copy arena has 69 632 bytes for one
GROUPS = ("239.1.1.1", "239.1.1.2", "239.1.1.3", "239.1.1.4")
PORTS = (5001, 5001, 5002, 5001)
SOURCES = ("10.1.0.1", "10.1.0.7", "10.1.0.9")  # anybody, whom a rule asks for, an egress socket of the relay
GROUPS6 = ("ff3e::8000:1", "ff3e::8000:2")
SOURCES6 = ("2001:db8::1", "2001:db8::7", "2001:db8::9")  # likewise
OWN_PORT, OWN_PRESERVING_PORT = 7777, 7778
ETHERNET = Ether(src="02:00:00:00:00:01", dst="01:00:5e:01:01:01")

TP_STATUS_USER, TP_STATUS_COPY = 1, 2
TP_STATUS_CSUMNOTREADY, TP_STATUS_CSUM_VALID = 1 << 3, 1 << 7
# LOSING, VLAN_VALID, BLK_TMO, VLAN_TPID_VALID, GSO_TCP, TS_SOFTWARE, TS_SYS_HARDWARE, TS_RAW_HARDWARE
TP_STATUS_OTHERS = 1 << 2 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 29 | 1 << 30 | 1 << 31

# What the kernel says of a frame.
META = np.dtype(
    [
        ("length", "<i8"),
        ("tp_len", "<i8"),
        ("status", "<i8"),
        ("gso_type", "<i8"),
        ("gso_size", "<i8"),
        ("pkttype", "<i8"),
    ]
)
SPECIAL = np.array([0, 1, 7, 8, 9, 19, 20, 27, 28, 29, 255, 256, 1472, 0x3FFF, 0x4000, 0x7FFF, 0x8000, 65507, 65535])
ETHERTYPES = np.array([0x0800, 0x86DD, 0x8100, 0x88A8, 0x86DD, 0x0806, 0x9100, 0])
GSO_TYPES = np.array([5, 5, 5, 5, 5, 1, 3, 4, 0x80, 0x85, 255, 0])


def datagram(payload: bytes, index: int = 0, sport: int = 4000, source: str = SOURCES[0], **ip: Any) -> Packet:
    """A datagram to one of GROUPS."""
    fields: Any = {"src": source, "dst": GROUPS[index], "ttl": 8} | ip
    return IP(**fields) / UDP(sport=sport, dport=PORTS[index]) / Raw(payload)


def datagram6(
    payload: bytes, *extensions: Packet, index: int = 0, sport: int = 4000, source: str = SOURCES6[0], hops: int = 8
) -> Packet:
    """A datagram to one of GROUPS6."""
    packet: Packet = IPv6(src=source, dst=GROUPS6[index], hlim=hops)
    for extension in extensions:
        packet /= extension
    return packet / UDP(sport=sport, dport=5001) / Raw(payload)


def _payload(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


def _media() -> list[bytes]:
    """RTP and transport streams, whole, and cut where their headers are."""
    adaptation = b"\x47\x01\x00\x30\x07\x10" + bytes(182)
    cells = (b"\x47\x01\x00\x10" + bytes(184)) * 6 + adaptation
    rtp = bytes.fromhex("8021000100000001000000ff")
    headers = (rtp, b"\x83" + rtp[1:] + bytes(12), b"\x90" + rtp[1:] + bytes.fromhex("bede0001") + bytes(4))
    cuts = [cells, adaptation, *(cells + adaptation[:more] for more in (1, 3, 4, 5, 6, 12))]
    return [*cuts, *(header + cells for header in headers), *(header[:-1] for header in headers), rtp + adaptation]


def sound_frames() -> list[bytes]:
    """Every kind of frame that a network sends."""
    tag, outer = Dot1Q(vlan=5), Dot1AD(vlan=7)
    packets = [ETHERNET / datagram(_payload(size), 0) for size in (0, 1, 17, 18, 100, 100, 100, 1316, 1472, 3900)]
    packets += [ETHERNET / datagram(payload, index) for payload in _media() for index in (0, 1)]
    packets += [ETHERNET / datagram(_payload(64), index) for index in (0, 1, 1, 2, 3)]
    packets += [ETHERNET / datagram(_payload(188), 1, ttl=ttl) for ttl in (0, 1, 2, 64, 255)]
    packets += [ETHERNET / datagram(_payload(40), 2, source=source) for source in SOURCES]
    packets += [
        ETHERNET / tag / datagram(_payload(100)),
        ETHERNET / outer / tag / datagram(_payload(100), 1),
        ETHERNET / tag / tag / tag / datagram(_payload(100)),
        ETHERNET / datagram(_payload(100), options=[IPOption(b"\x94\x04\0\0")]),
        ETHERNET / datagram(_payload(101), options=[IPOption(b"\x01" * 40)]),
        ETHERNET / datagram(_payload(100), flags="MF"),
        ETHERNET / datagram(_payload(100), frag=3),
        ETHERNET / datagram(_payload(60), 0, sport=OWN_PORT, source=SOURCES[2]),
        ETHERNET / datagram(_payload(60), 0, sport=OWN_PRESERVING_PORT),
    ]
    return [bytes(packet) for packet in (*packets, *_sound_frames6())]


def _sound_frames6() -> list[Packet]:
    """Of IPv6, half as many."""
    tag, outer = Dot1Q(vlan=5), Dot1AD(vlan=7)
    hop, destination = IPv6ExtHdrHopByHop(), IPv6ExtHdrDestOpt()
    routing = IPv6ExtHdrRouting(segleft=0, addresses=[SOURCES6[1]])
    part, last, whole = (IPv6ExtHdrFragment(offset=offset, m=m) for offset, m in ((0, 1), (3, 0), (0, 0)))
    packets = [datagram6(_payload(size)) for size in (0, 1, 17, 100, 100, 100, 1316, 1452, 3900)]
    packets += [datagram6(payload) for payload in _media()[::3]]
    packets += [datagram6(_payload(188), hops=hops) for hops in (0, 1, 2, 64, 255)]
    packets += [datagram6(_payload(40), index=1, source=source) for source in SOURCES6]
    packets += [datagram6(_payload(60), *e) for e in ((hop,), (hop, destination, routing, destination), (whole,))]
    packets += [datagram6(_payload(60), *e) for e in ((part,), (destination, last), (destination,) * 8)]
    packets.append(datagram6(_payload(60), sport=OWN_PORT, source=SOURCES6[2]))
    packets.append(datagram6(_payload(9), sport=OWN_PRESERVING_PORT))
    tagged = [ETHERNET / tag / packets[3], ETHERNET / outer / tag / packets[4], ETHERNET / tag / packets[-4]]
    return [*(ETHERNET / packet for packet in packets), *tagged]


def big_frames() -> list[bytes]:
    """Frames that fit no slot: jumbo and super-frames, one of them beyond what the copy arena holds."""
    sizes = (4100, 9000, 20_000, 64_000, 65_507)
    whole = [bytes(ETHERNET / datagram(_payload(size), index)) for size in sizes for index in (0, 1)]
    whole += [bytes(ETHERNET / datagram6(_payload(size))) for size in sizes]
    return [*whole, whole[0] + bytes(75_000)]


def as_array(frames: list[bytes], width: int) -> tuple[Any, Any]:
    """u1[frames, width] and their lengths."""
    array = np.zeros((len(frames), width), np.uint8)
    for row, frame in zip(array, frames, strict=True):
        row[: len(frame)] = np.frombuffer(frame, np.uint8)
    return array, np.array([len(frame) for frame in frames])


@compiled
def dice(state: Any, sides: int) -> int:
    """A number below `sides`; `state` is i8[1]."""
    state[0] = state[0] * np.int64(6364136223846793005) + np.int64(1442695040888963407)
    return ((state[0] >> 31) & 0x7FFFFFFF) % sides


@compiled
def store(frame: Any, length: int, at: int, value: int) -> None:
    """Two bytes, big-endian, as far as the frame goes."""
    if at >= 0 and at + 2 <= length:
        frame[at] = (value >> 8) & 0xFF
        frame[at + 1] = value & 0xFF


@compiled
def folded(total: int) -> int:
    """The checksum that makes a sum right."""
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


@compiled
def put_ip_checksum_right(frame: Any, length: int) -> None:
    """As far as there is a header."""
    ip = ip_offset(frame, length)
    if ip < 0 or ip + 20 > length or frame[ip] >> 4 == 6:
        return
    end = ip + (np.int64(frame[ip]) & 15) * 4
    if end <= length:
        store(frame, length, ip + 10, 0)
        store(frame, length, ip + 10, folded(words_sum(frame, ip, end)))


@compiled
def put_udp_checksum_right(frame: Any, length: int) -> None:
    """As far as there is a datagram of the length that it claims."""
    ip = ip_offset(frame, length)
    if ip < 0 or ip + 20 > length:
        return
    is_six = frame[ip] >> 4 == 6
    udp = find_udp6(frame, length, ip) if is_six else ip + (np.int64(frame[ip]) & 15) * 4
    if udp < 0 or udp + 8 > length:
        return
    size = number(frame, udp + 4, 2)
    if size >= 8 and udp + size <= length:
        store(frame, length, udp + 6, 0)
        store(frame, length, udp + 6, folded(udp_sum(frame, ip, udp, size)) or 0xFFFF)


@compiled
def value_for(former: int, special: Any, state: Any) -> int:
    """A number to put in a field's place: near the former, at a limit, or any."""
    kind = dice(state, 3)
    if kind == 0:
        return (former + dice(state, 17) - 8) & 0xFFFF
    if kind == 1:
        return special[dice(state, len(special))]
    return dice(state, 0x10000)


@compiled
def change(frame: Any, length: int, special: Any, ethertypes: Any, state: Any) -> int:
    """Change a frame in one way; return its length."""
    kind = dice(state, 9)
    ip = max(ip_offset(frame, length), 14)
    udp = ip + 20
    is_six = ip < length and frame[ip] >> 4 == 6
    if is_six:
        udp = ip + 40 + 8 * dice(state, 2)  # or somewhere in an extension header
    elif ip < length:
        udp = ip + max((np.int64(frame[ip]) & 15) * 4, 20)
    if kind == 0 and length:  # bytes anywhere
        for _ in range(1 + dice(state, 4)):
            frame[dice(state, length)] = dice(state, 256)
    elif kind == 1 and length:  # bytes of headers
        for _ in range(1 + dice(state, 2)):
            frame[min(12 + dice(state, max(udp - 4, 1)), length - 1)] = dice(state, 256)
    elif kind == 2:  # version and header length
        if ip < length:
            version = 0x60 if is_six else 0x40
            frame[ip] = version + dice(state, 16) if dice(state, 4) else dice(state, 256)
    elif kind == 3:  # total length
        at = ip + (4 if is_six else 2)
        if at + 2 <= length:
            store(frame, length, at, value_for(number(frame, at, 2), special, state))
    elif kind == 4:  # fragment, TTL and protocol, addresses
        at = ip + 6 + 2 * dice(state, 17 if is_six else 7)
        if at + 2 <= length and (is_six or at != ip + 10):
            store(frame, length, at, value_for(number(frame, at, 2), special, state))
    elif kind == 5:  # ports, length, checksum
        at = udp + 2 * dice(state, 4)
        if at + 2 <= length:
            store(frame, length, at, value_for(number(frame, at, 2), special, state))
    elif kind == 6:  # cut, mostly near the headers
        return dice(state, length + 1) if dice(state, 2) else min(dice(state, 64), length)
    elif kind == 7:  # something behind it
        more = min(1 + dice(state, 64), len(frame) - length)
        for at in range(length, length + more):
            frame[at] = dice(state, 256)
        return length + max(more, 0)
    else:  # ethertypes
        store(frame, length, 12 + 4 * dice(state, 3), ethertypes[dice(state, len(ethertypes))])
    return length


@compiled
def make(frame: Any, meta: Any, sound: Any, lengths: Any, special: Any, ethertypes: Any, gso: Any, state: Any) -> None:
    """One frame and what the kernel says of it. `sound`: u1[frames, …]; `meta`: a META record."""
    chosen = dice(state, len(lengths))
    length = lengths[chosen]
    for at in range(length):
        frame[at] = sound[chosen, at]
    changes = max(dice(state, 6) - 2, 0)
    for _ in range(changes):
        length = change(frame, length, special, ethertypes, state)
    if changes and dice(state, 4):
        put_udp_checksum_right(frame, length)
    if changes and dice(state, 8):
        put_ip_checksum_right(frame, length)
    meta.length = length
    meta.tp_len = length
    lie = dice(state, 64)
    if lie == 0:
        meta.tp_len = length + 1 + dice(state, 70_000)
    elif lie == 1:
        meta.tp_len = dice(state, length + 1)
    meta.status = TP_STATUS_USER
    if dice(state, 4) == 0:
        meta.status |= TP_STATUS_CSUM_VALID
    if dice(state, 8) == 0:
        meta.status |= TP_STATUS_CSUMNOTREADY
    if dice(state, 2) == 0:
        meta.status |= (dice(state, 1 << 16) << 16 | dice(state, 1 << 16)) & TP_STATUS_OTHERS
    if dice(state, 128) == 0:
        meta.status |= TP_STATUS_COPY  # whose copy never came
    meta.gso_type = 0
    meta.gso_size = 0
    if dice(state, 4) == 0:
        meta.gso_type = gso[dice(state, len(gso))]
        size = dice(state, 8)
        if size == 0:
            meta.gso_size = special[dice(state, len(special))]
        elif size == 1:
            meta.gso_size = dice(state, 0x10000)
        else:
            meta.gso_size = min(1 + length // (1 + dice(state, 70)), 0xFFFF)
    elif dice(state, 16) == 0:
        meta.gso_size = dice(state, 0x10000)
    meta.pkttype = dice(state, 5) if dice(state, 8) == 0 else 2
