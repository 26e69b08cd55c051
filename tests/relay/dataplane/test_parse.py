"""The parser against frames that scapy builds, and against itself on frames that are cut."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP, IPOption
from scapy.layers.inet6 import (
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    RouterAlert,
)
from scapy.layers.l2 import Dot1AD, Dot1Q, Ether
from scapy.packet import Packet, Raw

from relay.addresses import text_of
from relay.dataplane.layout import DATAGRAM, DropCause
from relay.dataplane.parse import parse


def run_parse(frame: bytes, gso_type: int = 0, gso_size: int = 0, trusted: bool = False) -> tuple[int, np.void]:
    memory = np.frombuffer(frame, np.uint8).copy()
    datagram = np.zeros(1, DATAGRAM)
    cause = parse(memory.ctypes.data, len(memory), gso_type, gso_size, trusted, datagram[0])
    if cause == DropCause.NONE:
        offset = int(datagram[0]["payload"]) - memory.ctypes.data
        assert offset >= 0
        assert offset + int(datagram[0]["payload_bytes"]) <= len(frame)
        datagram[0]["payload"] = offset
    return cause, datagram[0]


def addresses(datagram: Any) -> tuple[str, str]:
    source = text_of(int(datagram["src_first"]), int(datagram["src_second"]))
    return source, text_of(int(datagram["dst_first"]), int(datagram["dst_second"]))


def udp(payload: bytes, **ip: Any) -> Packet:
    return IP(src="10.0.0.7", dst="239.1.1.1", ttl=9, **ip) / UDP(sport=4000, dport=5000) / Raw(payload)


ETHER = Ether(dst="01:00:5e:01:01:01", src="02:00:00:00:00:01")


@pytest.mark.parametrize(
    "frame",
    [
        ETHER / udp(b"payload"),
        ETHER / Dot1Q(vlan=7) / udp(b"payload"),
        ETHER / Dot1AD(vlan=7) / Dot1Q(vlan=8) / udp(b"payload"),
        ETHER / udp(b"payload", options=[IPOption(b"\x94\x04\x00\x00")]),
        ETHER / udp(b"payload") / Raw(b""),
    ],
    ids=["plain", "vlan", "qinq", "ip-options", "no-padding"],
)
def test_datagram_is_found_behind_tags_and_options(frame: Packet) -> None:
    raw = bytes(frame)
    cause, datagram = run_parse(raw)
    assert cause == DropCause.NONE
    assert raw[datagram["payload"] :][: datagram["payload_bytes"]] == b"payload"
    assert addresses(datagram) == ("10.0.0.7", "239.1.1.1")
    assert (datagram["sport"], datagram["dport"], datagram["ttl"]) == (4000, 5000, 9)


def test_ethernet_padding_is_not_payload() -> None:
    cause, datagram = run_parse(bytes(ETHER / udp(b"x")) + bytes(17))
    assert (cause, datagram["payload_bytes"]) == (DropCause.NONE, 1)


def test_super_frame_counts_its_datagrams() -> None:
    raw = bytes(ETHER / udp(bytes(2500)))
    cause, datagram = run_parse(raw, gso_type=5, gso_size=1000, trusted=True)
    assert (cause, datagram["datagrams"], datagram["segment_bytes"]) == (DropCause.NONE, 3, 1000)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"version": 6}, DropCause.PARSE_ERROR),
        ({"ihl": 4}, DropCause.PARSE_ERROR),
        ({"proto": 6}, DropCause.PARSE_ERROR),
        ({"len": 20}, DropCause.PARSE_ERROR),
        ({"len": 60_000}, DropCause.PARSE_ERROR),
        ({"flags": "MF"}, DropCause.FRAGMENT),
        ({"frag": 3}, DropCause.FRAGMENT),
        ({"chksum": 1}, DropCause.CHECKSUM),
    ],
)
def test_wrong_ip_header_is_dropped_under_its_cause(change: dict[str, Any], cause: DropCause) -> None:
    frame = bytes(ETHER / IP(src="10.0.0.7", dst="239.1.1.1", **change) / UDP(dport=5000) / Raw(b"payload"))
    assert run_parse(frame)[0] == cause


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"len": 7}, DropCause.PARSE_ERROR),
        ({"len": 900}, DropCause.PARSE_ERROR),
        ({"chksum": 1}, DropCause.CHECKSUM),
    ],
)
def test_wrong_udp_header_is_dropped_under_its_cause(change: dict[str, Any], cause: DropCause) -> None:
    datagram = UDP(sport=4000, dport=5000, **change) / Raw(b"payload")
    assert run_parse(bytes(ETHER / IP(dst="239.1.1.1") / datagram))[0] == cause


def udp6(payload: bytes, *extensions: Packet, **udp: Any) -> Packet:
    packet: Packet = IPv6(src="2001:db8::7", dst="ff3e::8000:1", hlim=9)
    for extension in extensions:
        packet /= extension
    return packet / UDP(sport=4000, dport=5000, **udp) / Raw(payload)


HOP = IPv6ExtHdrHopByHop(options=[RouterAlert()])
DEST = IPv6ExtHdrDestOpt(options=[])
ROUTING = IPv6ExtHdrRouting(segleft=0, addresses=["2001:db8::9"])
ATOMIC = IPv6ExtHdrFragment(offset=0, m=0)


@pytest.mark.parametrize(
    "frame",
    [
        ETHER / udp6(b"payload"),
        ETHER / Dot1Q(vlan=7) / udp6(b"payload"),
        ETHER / Dot1AD(vlan=7) / Dot1Q(vlan=8) / udp6(b"payload"),
        ETHER / udp6(b"payload", HOP),
        ETHER / udp6(b"payload", HOP, DEST, ROUTING, DEST),
        ETHER / udp6(b"payload", ATOMIC),
        ETHER / udp6(b"payload", *[DEST] * 8),
        bytes(ETHER / udp6(b"payload")) + bytes(17),
    ],
    ids=["plain", "vlan", "qinq", "hop-by-hop", "each", "atomic-fragment", "eight", "padded"],
)
def test_datagram_is_found_in_ipv6_behind_extension_headers(frame: Packet | bytes) -> None:
    raw = bytes(frame)
    cause, datagram = run_parse(raw)
    assert cause == DropCause.NONE
    assert raw[datagram["payload"] :][: datagram["payload_bytes"]] == b"payload"
    assert addresses(datagram) == ("2001:db8::7", "ff3e::8000:1")
    assert (datagram["sport"], datagram["dport"], datagram["ttl"]) == (4000, 5000, 9)


@pytest.mark.parametrize(
    ("packet", "cause"),
    [
        (udp6(b"payload", IPv6ExtHdrFragment(offset=0, m=1)), DropCause.FRAGMENT),
        (udp6(b"payload", IPv6ExtHdrFragment(offset=3, m=0)), DropCause.FRAGMENT),
        (udp6(b"payload", DEST, IPv6ExtHdrFragment(offset=3, m=0)), DropCause.FRAGMENT),
        (udp6(b"payload", DEST, HOP), DropCause.PARSE_ERROR),  # RFC 8200, 4.1: the first or nowhere
        (udp6(b"payload", IPv6ExtHdrRouting(segleft=1, addresses=["2001:db8::9"])), DropCause.PARSE_ERROR),
        (udp6(b"payload", *[DEST] * 9), DropCause.PARSE_ERROR),
        (IPv6(nh=6, dst="ff3e::1") / Raw(bytes(40)), DropCause.PARSE_ERROR),
        (IPv6(nh=59, dst="ff3e::1") / Raw(bytes(40)), DropCause.PARSE_ERROR),
        (IPv6(nh=60, dst="ff3e::1") / Raw(bytes([17, 255]) + bytes(60)), DropCause.PARSE_ERROR),
        (IPv6(nh=17, plen=0, dst="ff3e::1") / Raw(bytes(60)), DropCause.PARSE_ERROR),  # as BIG TCP says it
        (IPv6(nh=17, plen=900, dst="ff3e::1") / Raw(bytes(60)), DropCause.PARSE_ERROR),
        (IPv6(nh=17, plen=7, dst="ff3e::1") / Raw(bytes(60)), DropCause.PARSE_ERROR),
        (IPv6(version=4, dst="ff3e::1") / UDP() / Raw(b"payload"), DropCause.PARSE_ERROR),
        (IPv6(src="::ffff:10.0.0.7", dst="ff3e::1") / UDP() / Raw(b"payload"), DropCause.PARSE_ERROR),
        (IPv6(dst="::ffff:239.1.1.1") / UDP() / Raw(b"payload"), DropCause.PARSE_ERROR),
        (udp6(b"payload", len=7), DropCause.PARSE_ERROR),
        (udp6(b"payload", len=900), DropCause.PARSE_ERROR),
        (udp6(b"payload", chksum=1), DropCause.CHECKSUM),
        (udp6(b"payload", chksum=0), DropCause.CHECKSUM),  # RFC 8200, 8.1
    ],
)
def test_wrong_ipv6_is_dropped_under_its_cause(packet: Packet, cause: DropCause) -> None:
    assert run_parse(bytes(ETHER / packet))[0] == cause


def test_a_checksum_is_not_looked_at_where_the_kernel_vouches_for_it() -> None:
    assert run_parse(bytes(ETHER / udp6(b"payload", chksum=0)), trusted=True)[0] == DropCause.NONE


def test_super_frame_of_ipv6_counts_its_datagrams() -> None:
    cause, datagram = run_parse(bytes(ETHER / udp6(bytes(2500))), gso_type=5, gso_size=1000, trusted=True)
    assert (cause, datagram["datagrams"], datagram["segment_bytes"]) == (DropCause.NONE, 3, 1000)


@given(payload=st.binary(max_size=3000), make=st.sampled_from([udp, udp6]))
@settings(max_examples=200, deadline=None)
def test_checksum_of_any_payload_is_verified(payload: bytes, make: Callable[[bytes], Packet]) -> None:
    frame = bytearray(bytes(ETHER / make(payload)))
    assert run_parse(bytes(frame))[0] == DropCause.NONE
    if payload:
        frame[-1] ^= 1
        assert run_parse(bytes(frame))[0] == DropCause.CHECKSUM


@given(data=st.data())
@settings(max_examples=500, deadline=None)
def test_mutated_frames_never_yield_bytes_outside_the_frame(data: st.DataObject) -> None:
    packet = data.draw(
        st.sampled_from([udp(b"payload" * 9), udp6(b"payload" * 9), udp6(b"payload", HOP, ROUTING, DEST)])
    )
    frame = bytearray(bytes(ETHER / Dot1Q(vlan=7) / packet))
    for _ in range(data.draw(st.integers(0, 6))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(frame[: data.draw(st.integers(0, len(frame)))])
    run_parse(cut, data.draw(st.integers(0, 6)), data.draw(st.integers(0, 70_000)), data.draw(st.booleans()))
