"""The ring filter, run by a slow, obvious interpreter and by the kernel: it never rejects what a rule wants."""

import ipaddress
import socket
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP, IPOption, fragment
from scapy.layers.inet6 import (
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    fragment6,
)
from scapy.layers.l2 import Dot1AD, Dot1Q, Ether
from scapy.packet import Raw

from relay import bpf
from relay.supervisor.ingress import attach_filter


def run(program: tuple[bpf.Instruction, ...], frame: bytes, packet_type: int = 0) -> bool:
    """Whether a classic BPF program accepts a frame. A load beyond the frame rejects it."""
    a = x = at = 0
    memory = [0] * 16
    while True:
        code, jt, jf, k = program[at]
        at += 1
        size = {bpf.LD_HALF_ABS: 2, bpf.LD_WORD_IND: 4, bpf.LD_HALF_IND: 2, bpf.LD_BYTE_IND: 1}.get(code)
        if size is not None:
            start = k if code == bpf.LD_HALF_ABS else x + k
            if start + size > len(frame):
                return False
            a = int.from_bytes(frame[start : start + size], "big")
        elif code == bpf.LD_BYTE_ABS:
            assert k == bpf.SKF_AD_PKTTYPE
            a = packet_type
        elif code == bpf.LD_LENGTH:
            a = len(frame)
        elif code == bpf.LD_MEM:
            a = memory[k]
        elif code == bpf.ST:
            memory[k] = a
        elif code == bpf.LD_IMM:
            a = k
        elif code == bpf.LDX_IMM:
            x = k
        elif code == bpf.TAX:
            x = a
        elif code == bpf.ALU_AND_K:
            a &= k
        elif code == bpf.ALU_LSH_K:
            a <<= k
        elif code == bpf.ALU_SUB_K:
            a = (a - k) & 0xFFFFFFFF
        elif code == bpf.ALU_ADD_X:
            a = (a + x) & 0xFFFFFFFF
        elif code == bpf.JA:
            at += k
        elif code in (bpf.JEQ_K, bpf.JGT_K, bpf.JGE_K, bpf.JGE_X):
            truth = {bpf.JEQ_K: a == k, bpf.JGT_K: a > k, bpf.JGE_K: a >= k, bpf.JGE_X: a >= x}[code]
            at += jt if truth else jf
        else:
            assert code == bpf.RET_K
            return k != 0


def link(tags: int = 0) -> Any:
    """An Ethernet header with VLAN tags."""
    packet = Ether(src="02:00:00:00:00:01", dst="01:00:5e:00:00:01")
    packet = packet / Dot1AD(vlan=2) if tags == 2 else packet
    return packet / Dot1Q(vlan=1) if tags else packet


def frame(address: str, port: int, tags: int = 0, options: int = 0, source: str | None = None) -> bytes:
    """A datagram's frame with VLAN tags and 4-byte IP options, which IPv6 has not."""
    if ":" in address:
        ip: Any = IPv6(src=source or "fd00::9", dst=address)
    else:
        ip = IP(src=source or "10.1.0.9", dst=address, options=[IPOption(b"\x01" * 4)] * options)
    return bytes(link(tags) / ip / UDP(dport=port) / Raw(b"payload"))


def to_ipv6(words: tuple[int, ...]) -> str:
    return str(ipaddress.IPv6Address(sum(word << 32 * at for at, word in enumerate(reversed(words)))))


IPV4 = st.integers(0xE0000001, 0xEFFFFFFF).map(lambda number: str(ipaddress.IPv4Address(number)))
WORD = st.sampled_from([0, 1, 2, 0xFFFF_FFFF]) | st.integers(0, 0xFFFF_FFFF)  # so that words are often equal
IPV6 = st.tuples(st.sampled_from([0xFF3E0000, 0xFF050000, 0xFD000000]), WORD, WORD, WORD).map(to_ipv6)
ADDRESSES = IPV4 | IPV6
PORTS = st.sampled_from([1, 5001, 65_535]) | st.integers(1, 65_535)
INPUTS = st.sets(st.tuples(ADDRESSES, PORTS), min_size=1, max_size=40)
Inputs = set[bpf.Input]


@given(INPUTS, st.data(), st.integers(0, 2), st.integers(0, 10))
def test_what_a_rule_wants_is_accepted_with_any_tags_and_options(
    inputs: Inputs, data: st.DataObject, tags: int, options: int
) -> None:
    address, port = data.draw(st.sampled_from(sorted(inputs)))
    assert run(bpf.assemble(inputs), frame(address, port, tags, options))


@given(INPUTS, ADDRESSES, PORTS, st.integers(0, 2))
def test_what_no_rule_wants_is_rejected(inputs: Inputs, address: str, port: int, tags: int) -> None:
    assert run(bpf.assemble(inputs), frame(address, port, tags)) == ((address, port) in inputs)


@given(INPUTS, st.data(), st.integers(0, 127), st.integers(0, 2))
def test_an_ipv6_address_is_compared_to_its_last_bit(inputs: Inputs, data: st.DataObject, bit: int, tags: int) -> None:
    address, port = data.draw(st.tuples(IPV6, PORTS))
    near = str(ipaddress.IPv6Address(int(ipaddress.IPv6Address(address)) ^ 1 << bit))
    program = bpf.assemble(inputs | {(address, port)})
    assert run(program, frame(address, port, tags))
    assert run(program, frame(near, port, tags)) == ((near, port) in inputs)


@given(st.sets(st.tuples(IPV4, PORTS), min_size=1), st.sets(st.tuples(IPV6, PORTS), min_size=1), st.integers(0, 2))
def test_a_version_is_rejected_without_inputs_of_it(ipv4: Inputs, ipv6: Inputs, tags: int) -> None:
    assert not any(run(bpf.assemble(ipv4), frame(*wanted, tags)) for wanted in ipv6)
    assert not any(run(bpf.assemble(ipv6), frame(*wanted, tags)) for wanted in ipv4)


EXTENSIONS = [IPv6ExtHdrHopByHop(), IPv6ExtHdrRouting(), IPv6ExtHdrDestOpt(), IPv6ExtHdrFragment()]


@given(st.sets(st.tuples(IPV6, PORTS), min_size=1), IPV6, st.sampled_from(EXTENSIONS), st.integers(0, 2))
def test_datagrams_with_extension_headers_pass_by_address(ipv6: Inputs, other: str, header: Any, tags: int) -> None:
    program = bpf.assemble(ipv6)
    rest = header / UDP(dport=1) / Raw(b"payload")
    addresses = {address for address, _ in ipv6}
    assert all(run(program, bytes(link(tags) / IPv6(dst=address) / rest)) for address in addresses)
    assert run(program, bytes(link(tags) / IPv6(dst=other) / rest)) == (other in addresses)


@pytest.mark.parametrize("protocol", [6, 58, 59, 50, 51])
def test_ipv6_that_is_no_udp_is_rejected(protocol: int) -> None:
    program = bpf.assemble({("ff3e::1", 5001)})
    udp = bytes(UDP(dport=5001)) + b"payload"
    assert not run(program, bytes(link() / IPv6(dst="ff3e::1", nh=protocol) / Raw(udp)))


@given(INPUTS, st.binary(max_size=100), st.sampled_from([b"", bytes(12) + b"\x86\xdd\x60"]))
def test_no_frame_leads_the_program_astray(inputs: Inputs, raw: bytes, head: bytes) -> None:
    assert run(bpf.assemble(inputs), head + raw) in (True, False)


def numbered(count: int) -> Inputs:
    return {(str(ipaddress.IPv4Address(0xEF000000 + i * 7)), 1 + i % 60_000) for i in range(count)}


def numbered6(count: int) -> Inputs:
    return {(str(ipaddress.IPv6Address(0xFF3E << 112 | i * 7)), 1 + i % 60_000) for i in range(count)}


@pytest.mark.parametrize(
    ("count", "count6"),
    [
        *((count, 0) for count in (1, 300, 700, 5000)),
        *((0, count) for count in (1, 300, 700, 5000)),
        *((1, 1), (200, 300), (1, 5000), (5000, 1), (5000, 5000)),
    ],
)
def test_any_number_of_inputs_makes_a_program_that_the_kernel_takes(count: int, count6: int) -> None:
    inputs = numbered(count) | numbered6(count6)
    program = bpf.assemble(inputs)
    assert len(program) <= bpf.BPF_MAXINSNS
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        attach_filter(sock, program)
    assert all(run(program, frame(*wanted)) for wanted in list(inputs)[:50])
    assert run(program, frame("239.0.0.1", 1)) == (count == 5000)
    assert run(program, frame("ff3e::1", 1)) == (count6 == 5000)


def test_many_inputs_of_one_version_leave_those_of_the_other_exact() -> None:
    program = bpf.assemble(numbered6(5000) | {("239.1.1.1", 5001)})
    assert run(program, frame("239.1.1.1", 5001))
    assert not run(program, frame("239.1.1.1", 5002))
    by_address = bpf.assemble(numbered6(700))
    assert run(by_address, frame("ff3e::7", 2))
    assert run(by_address, frame("ff3e::7", 3))
    assert not run(by_address, frame("ff3e::8", 2))


def test_no_inputs_reject_everything() -> None:
    assert not run(bpf.assemble(()), frame("239.1.1.1", 5001))
    assert not run(bpf.assemble(()), frame("ff3e::1", 5001))


@pytest.mark.parametrize(("address", "lengths"), [("239.1.1.1", (20, 41, 42, 60, 77)), ("ff3e::1", (20, 42, 54, 61))])
def test_truncated_headers_pass_so_that_they_are_counted(address: str, lengths: tuple[int, ...]) -> None:
    program = bpf.assemble({(address, 5001)})
    whole = frame(address, 5001, options=10)
    assert all(run(program, whole[:length]) for length in lengths)


# --- captures ---------------------------------------------------------------------------------------

OUTGOING, MULTICAST = 4, 2  # linux/if_packet.h


@given(INPUTS, INPUTS, st.data(), st.integers(0, 2), st.integers(0, 10))
def test_a_capture_has_each_direction_alone(
    incoming: Inputs, outgoing: Inputs, data: st.DataObject, tags: int, options: int
) -> None:
    wanted = data.draw(st.sampled_from(sorted(incoming | outgoing)))
    program = bpf.assemble_capture(incoming, outgoing)
    shown = frame(*wanted, tags, options)
    assert run(program, shown, MULTICAST) == (wanted in incoming)
    assert run(program, shown, OUTGOING) == (wanted in outgoing)


@given(INPUTS, st.tuples(ADDRESSES, PORTS), st.binary(max_size=41))
def test_a_capture_lets_nothing_else_through(wanted: Inputs, other: bpf.Input, cut: bytes) -> None:
    program = bpf.assemble_capture(wanted, wanted)
    assert run(program, frame(*other), MULTICAST) == (other in wanted)
    assert not run(program, cut, MULTICAST)


def test_a_capture_of_one_source_has_no_other() -> None:
    wanted = [("239.1.1.1", 5001), ("ff3e::1", 5001)]
    sent = [("239.1.1.1", "10.1.0.1"), ("239.1.1.1", "10.1.0.2"), ("ff3e::1", "fd00::1"), ("ff3e::1", "fd01::1")]
    frames = [frame(group, 5001, source=source) for group, source in sent]
    program = bpf.assemble_capture(wanted, [], "10.1.0.1")
    assert [run(program, whole, MULTICAST) for whole in frames] == [True, False, False, False]
    program = bpf.assemble_capture(wanted, [], "fd00::1")
    assert [run(program, whole, MULTICAST) for whole in frames] == [False, False, True, False]


@pytest.mark.parametrize("tags", [0, 1, 2])
def test_a_capture_has_all_fragments_of_a_datagram(tags: int) -> None:
    program = bpf.assemble_capture([("239.1.1.1", 5001)], [])
    whole = IP(dst="239.1.1.1") / UDP(dport=5001) / Raw(bytes(3001))
    fragments = fragment(whole, 1480)  # type: ignore[no-untyped-call]
    assert len(fragments) == 3
    assert all(run(program, bytes(link(tags) / part), MULTICAST) for part in fragments)
    last = IP(dst="239.1.1.1", proto=17, frag=185) / Raw(b"x")  # shorter than a port
    assert run(program, bytes(link(tags) / last).ljust(60, b"\0"), MULTICAST)


@pytest.mark.parametrize("tags", [0, 1, 2])
def test_a_capture_has_all_ipv6_fragments_to_the_address(tags: int) -> None:
    program = bpf.assemble_capture([("ff3e::1", 5001)], [])
    whole = IPv6(dst="ff3e::1") / IPv6ExtHdrFragment() / UDP(dport=5001) / Raw(bytes(3001))
    fragments = fragment6(whole, 1280)  # type: ignore[no-untyped-call]
    assert len(fragments) == 3
    assert all(run(program, bytes(link(tags) / part), MULTICAST) for part in fragments)


@pytest.mark.parametrize("numbers", [numbered, numbered6])
@pytest.mark.parametrize("count", [1, 300, 900, 1024])
def test_a_capture_of_any_rule_makes_a_program_that_the_kernel_takes(
    count: int, numbers: Callable[[int], Inputs]
) -> None:
    outputs = numbers(count)
    program = bpf.assemble_capture([("238.1.1.1", 5001), ("ff35::1", 5001)], outputs)
    assert len(program) <= bpf.BPF_MAXINSNS
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        attach_filter(sock, program)
    assert all(run(program, frame(*output), OUTGOING) for output in outputs)
    other = "239.0.0.1" if numbers is numbered else "ff3e::1"
    assert run(program, frame(other, 1), OUTGOING) == (count == 1024)  # too many for a filter: all that leaves
    assert run(program, frame("238.1.1.1", 5001), MULTICAST)
    assert run(program, frame("ff35::1", 5001), MULTICAST)
