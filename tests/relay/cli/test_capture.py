"""What of `mcrctl capture` needs no socket: what a wire carries, where a rule is captured, the file's blocks."""

import io
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP, IPOption
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Packet, Raw
from scapy.utils import PcapNgReader

from relay.cli.capture import pcapng
from relay.cli.capture.offload import VirtioNetHdr, checksum, on_the_wire, with_tag
from relay.cli.capture.session import packets_of
from relay.cli.capture.sides import find, sides_of
from relay.cli.capture.tap import Frame
from relay.errors import RuleError

NEEDS_CSUM, UDP_L4 = 1, 5  # linux/virtio_net.h
ETH_HLEN = 14


def datagram(payload: bytes, identity: int = 1, options: int = 0, tags: int = 0) -> Packet:
    """A datagram as a wire carries it, before scapy fills in lengths and checksums."""
    link = Ether(src="02:00:00:00:00:01", dst="01:00:5e:01:01:01")
    for _ in range(tags):
        link /= Dot1Q(vlan=7)
    ip = IP(src="10.1.0.1", dst="239.1.1.1", id=identity, options=[IPOption(b"\x01" * 4)] * options)
    return link / ip / UDP(sport=4000, dport=5001) / Raw(payload)


def handed_over(payload: bytes, segment_bytes: int, identity: int, options: int, tags: int) -> tuple[bytes, Any]:
    """The same as one frame for the network card to segment: the lengths and sums of the first datagram, or none."""
    frame = bytes(datagram(payload, identity, options, tags))
    udp = ETH_HLEN + 4 * tags + 20 + 4 * options
    frame = frame[: udp + 6] + b"\xab\xcd" + frame[udp + 8 :]
    return frame, VirtioNetHdr(NEEDS_CSUM, UDP_L4, udp + 8, segment_bytes, udp, 6)


@given(
    st.binary(min_size=1, max_size=4000),
    st.integers(1, 1500),
    st.integers(0, 0xFFFF),
    st.integers(0, 10),
    st.integers(0, 2),
)
def test_a_super_frame_is_the_datagrams_that_a_wire_carries(
    payload: bytes, segment_bytes: int, identity: int, options: int, tags: int
) -> None:
    frame, left = handed_over(payload, segment_bytes, identity, options, tags)
    expected = [
        bytes(datagram(payload[at : at + segment_bytes], (identity + number) & 0xFFFF, options, tags))
        for number, at in enumerate(range(0, len(payload), segment_bytes))
    ]
    assert list(on_the_wire(frame, left)) == expected


@given(st.binary(min_size=1, max_size=4000), st.integers(1, 1500), st.booleans(), st.integers(0, 2))
def test_a_super_frame_of_ipv6_is_the_datagrams_that_a_wire_carries(
    payload: bytes, segment_bytes: int, extended: bool, tags: int
) -> None:
    link = Ether(src="02:00:00:00:00:01", dst="33:33:00:00:00:01")
    for _ in range(tags):
        link /= Dot1Q(vlan=7)
    head = link / IPv6(src="fd00::1", dst="ff3e::1", tc=0xB8, fl=7)
    head = head / IPv6ExtHdrDestOpt() if extended else head
    head = head / UDP(sport=4000, dport=5001)
    frame = bytes(head / Raw(payload))
    udp = len(frame) - len(payload) - 8
    frame = frame[: udp + 6] + b"\xab\xcd" + frame[udp + 8 :]
    expected = [bytes(head / Raw(payload[at : at + segment_bytes])) for at in range(0, len(payload), segment_bytes)]
    assert list(on_the_wire(frame, VirtioNetHdr(NEEDS_CSUM, UDP_L4, udp + 8, segment_bytes, udp, 6))) == expected


@given(st.binary(max_size=100))
def test_a_checksum_that_was_left_to_the_card_is_filled_in(payload: bytes) -> None:
    whole = bytes(datagram(payload))
    udp = ETH_HLEN + 20
    pseudo = whole[26:34] + struct.pack(">BBH", 0, 17, len(whole) - udp)
    sum_of_pseudo = 0xFFFF - checksum(pseudo)  # which the kernel leaves in the field
    frame = whole[: udp + 6] + struct.pack(">H", sum_of_pseudo) + whole[udp + 8 :]
    assert list(on_the_wire(frame, VirtioNetHdr(NEEDS_CSUM, 0, 0, 0, udp, 6))) == [whole]
    assert list(on_the_wire(frame, VirtioNetHdr())) == [frame]
    cut = frame[: udp + 4]
    assert list(on_the_wire(cut, VirtioNetHdr(NEEDS_CSUM, 0, 0, 0, udp, 6))) == [cut]


def test_a_tag_comes_back_where_it_was() -> None:
    tagged = bytes(Ether(dst="01:00:5e:01:01:01") / Dot1Q(vlan=7, prio=3) / IP(dst="239.1.1.1") / UDP())
    assert with_tag(tagged[:12] + tagged[16:], 0x8100, 3 << 13 | 7) == tagged


def test_packets_are_tagged_and_cut_and_keep_their_length() -> None:
    frame, left = handed_over(b"x" * 250, 100, 1, 0, 0)
    packets = packets_of(3, Frame(5, frame, len(frame), 4, left, (0x8100, 7)), 60)
    headers = 14 + 4 + 28
    assert [(packet[0], packet[1], len(packet[2]), packet[3], packet[4]) for packet in packets] == [
        (5, 3, 60, headers + size, pcapng.FLAG_OUTBOUND) for size in (100, 100, 50)
    ]
    assert all(packet[2][12:16] == b"\x81\x00\x00\x07" for packet in packets)


LISTED: dict[str, Any] = {
    "rule_id": "tv",
    "input_group": "239.1.1.1",
    "input_port": 5001,
    "input_interfaces": ["left", "both"],
    "source": "10.1.0.1",
    "outputs": [
        {"group": "239.2.2.2", "port": 6001, "interface": "right"},
        {"group": "10.2.0.2", "port": 6002, "interface": "right"},
        {"group": "239.2.2.3", "port": 6001, "interface": "both"},
    ],
}


def test_each_interface_of_a_rule_is_captured_once() -> None:
    described = {
        wanted: [(s.interface, s.source, len(s.incoming), len(s.outgoing)) for s in sides_of(LISTED, wanted)]
        for wanted in ("ingress", "egress", "both")
    }
    source = "10.1.0.1"
    assert described == {
        "ingress": [("left", source, 1, 0), ("both", source, 1, 0)],
        "egress": [("right", None, 0, 2), ("both", None, 0, 1)],
        "both": [("left", source, 1, 0), ("both", source, 1, 1), ("right", None, 0, 2)],
    }
    assert sides_of(LISTED, "both")[1].describe("tv") == "ingress and egress of rule tv"


def test_both_legs_are_captured_each_with_its_source() -> None:
    second = {"input_group": "239.1.1.9", "input_port": None, "input_interface": "both", "source": None}
    left, both, right = sides_of({**LISTED, "secondary": second}, "both")
    assert (left.incoming, both.source) == ([("239.1.1.1", 5001)], "10.1.0.1")
    assert both.incoming == [("239.1.1.1", 5001), ("239.1.1.9", 5001)]
    assert both.outgoing == [("239.2.2.3", 6001)]
    assert len(right.outgoing) == 2
    of_another = {"input_group": None, "input_port": 5002, "input_interface": "left", "source": "10.1.0.7"}
    sides = sides_of({**LISTED, "secondary": of_another}, "ingress")
    assert [(side.interface, side.source) for side in sides] == [
        ("left", "10.1.0.1"),
        ("both", "10.1.0.1"),
        ("left", "10.1.0.7"),
    ]
    assert sides[2].incoming == [("239.1.1.1", 5002)]


def test_both_versions_are_captured_at_once() -> None:
    outputs = [{"group": "ff3e::2", "port": 6001, "interface": "left"}, LISTED["outputs"][0]]
    rule = {**LISTED, "input_group": "ff3e::1", "source": "fd00::7", "outputs": outputs}
    left, _, right = sides_of(rule, "both")
    assert (left.incoming, left.outgoing, left.source) == ([("ff3e::1", 5001)], [("ff3e::2", 6001)], "fd00::7")
    assert (right.incoming, right.outgoing) == ([], [("239.2.2.2", 6001)])
    assert left.program() != right.program()


def test_a_rule_that_is_not_there_is_named() -> None:
    assert find([LISTED], "tv") is LISTED
    with pytest.raises(RuleError, match="no rule radio: `mcrctl list-rules` shows those there are"):
        find([LISTED], "radio")


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, (1 << 63) - 1), st.binary(max_size=90)), max_size=6))
def test_another_program_reads_what_was_written(packets: list[tuple[int, int, bytes]]) -> None:
    file = pcapng.section_header("mcrctl", "Linux", "rule tv")
    file += b"".join(pcapng.interface_description(name, "of tv", 100) for name in ("left", "a-b"))
    for interface, time_ns, data in packets:
        file += pcapng.enhanced_packet(interface, time_ns, data, len(data) + 7, pcapng.FLAG_INBOUND)
    file += b"".join(pcapng.interface_statistics(i, 1 << 60, (1 << 60) + 1, 10, 3, 7) for i in (0, 1))
    with PcapNgReader(io.BytesIO(file)) as reader:  # type: ignore[arg-type]
        read = [reader._read_packet() for _ in packets]
    assert [data for data, _ in read] == [data for _, _, data in packets]
    for (_, about), (interface, time_ns, data) in zip(read, packets, strict=True):
        assert (about.tshigh << 32 | about.tslow, about.tsresol) == (time_ns, 10**9)
        assert about.wirelen == len(data) + 7
        assert about.ifname in (name.encode() for name in ("left", "a-b"))
        assert about.ifname == (b"left", b"a-b")[interface]


def test_every_block_has_its_length_twice_and_ends_at_four_bytes() -> None:
    blocks = [
        pcapng.section_header("m", "Linux", ""),
        pcapng.interface_description("lo", "x", 0),
        pcapng.enhanced_packet(0, 1, b"12345", 5, 0),
        pcapng.interface_statistics(0, 1, 2, 3, 4, 5),
    ]
    for block in blocks:
        total = int.from_bytes(block[4:8], "little")
        assert total == len(block) == int.from_bytes(block[-4:], "little")
        assert total % 4 == 0
