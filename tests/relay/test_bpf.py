"""The ring filter, run by a slow, obvious interpreter and by the kernel: it never rejects what a rule wants."""

import ipaddress
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP, IPOption, fragment
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


def frame(address: int, port: int, tags: int = 0, options: int = 0) -> bytes:
    """A datagram's frame with VLAN tags and 4-byte IP options."""
    packet = Ether(src="02:00:00:00:00:01", dst="01:00:5e:00:00:01")
    packet = packet / Dot1AD(vlan=2) if tags == 2 else packet
    packet = packet / Dot1Q(vlan=1) if tags else packet
    ip = IP(dst=str(ipaddress.IPv4Address(address)), options=[IPOption(b"\x01" * 4)] * options)
    return bytes(packet / ip / UDP(dport=port) / Raw(b"payload"))


ADDRESSES = st.integers(0xE0000001, 0xEFFFFFFF)
PORTS = st.integers(1, 65_535)
INPUTS = st.sets(st.tuples(ADDRESSES, PORTS), min_size=1, max_size=40)


@given(INPUTS, st.data(), st.integers(0, 2), st.integers(0, 10))
def test_what_a_rule_wants_is_accepted_with_any_tags_and_options(
    inputs: set[tuple[int, int]], data: st.DataObject, tags: int, options: int
) -> None:
    address, port = data.draw(st.sampled_from(sorted(inputs)))
    assert run(bpf.assemble(inputs), frame(address, port, tags, options))


@given(INPUTS, ADDRESSES, PORTS)
def test_what_no_rule_wants_is_rejected(inputs: set[tuple[int, int]], address: int, port: int) -> None:
    assert run(bpf.assemble(inputs), frame(address, port)) == ((address, port) in inputs)


@given(INPUTS, st.binary(max_size=100))
def test_no_frame_leads_the_program_astray(inputs: set[tuple[int, int]], raw: bytes) -> None:
    assert run(bpf.assemble(inputs), raw) in (True, False)


@pytest.mark.parametrize("count", [1, 300, 700, 5000])
def test_any_number_of_inputs_makes_a_program_that_the_kernel_takes(count: int) -> None:
    inputs = {(0xEF000000 + i * 7, 1 + i % 60_000) for i in range(count)}
    program = bpf.assemble(inputs)
    assert len(program) <= bpf.BPF_MAXINSNS
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        attach_filter(sock, program)
    assert all(run(program, frame(*wanted)) for wanted in list(inputs)[:50])


def test_no_inputs_reject_everything() -> None:
    assert not run(bpf.assemble(()), frame(0xEF010101, 5001))


def test_truncated_headers_pass_so_that_they_are_counted() -> None:
    program = bpf.assemble({(0xEF010101, 5001)})
    whole = frame(0xEF010101, 5001, options=10)
    assert all(run(program, whole[:length]) for length in (20, 41, 42, 60, 77))


# --- captures ---------------------------------------------------------------------------------------

OUTGOING, MULTICAST = 4, 2  # linux/if_packet.h


@given(INPUTS, INPUTS, st.data(), st.integers(0, 2), st.integers(0, 10))
def test_a_capture_has_each_direction_alone(
    incoming: set[tuple[int, int]], outgoing: set[tuple[int, int]], data: st.DataObject, tags: int, options: int
) -> None:
    wanted = data.draw(st.sampled_from(sorted(incoming | outgoing)))
    program = bpf.assemble_capture(incoming, outgoing)
    shown = frame(*wanted, tags, options)
    assert run(program, shown, MULTICAST) == (wanted in incoming)
    assert run(program, shown, OUTGOING) == (wanted in outgoing)


@given(INPUTS, st.tuples(ADDRESSES, PORTS), st.binary(max_size=41))
def test_a_capture_lets_nothing_else_through(wanted: set[tuple[int, int]], other: tuple[int, int], cut: bytes) -> None:
    program = bpf.assemble_capture(wanted, wanted)
    assert run(program, frame(*other), MULTICAST) == (other in wanted)
    assert not run(program, cut, MULTICAST)


def test_a_capture_of_one_source_has_no_other() -> None:
    sent = {source: frame_from(source, 0xEF010101, 5001) for source in ("10.1.0.1", "10.1.0.2")}
    program = bpf.assemble_capture([(0xEF010101, 5001)], [], 0x0A010001)
    assert [run(program, whole, MULTICAST) for whole in sent.values()] == [True, False]


def frame_from(source: str, address: int, port: int) -> bytes:
    """A datagram's frame with a source address."""
    ip = IP(src=source, dst=str(ipaddress.IPv4Address(address)))
    return bytes(Ether(dst="01:00:5e:01:01:01") / ip / UDP(dport=port) / Raw(b"payload"))


@pytest.mark.parametrize("tags", [0, 1, 2])
def test_a_capture_has_all_fragments_of_a_datagram(tags: int) -> None:
    program = bpf.assemble_capture([(0xEF010101, 5001)], [])
    whole = IP(dst="239.1.1.1") / UDP(dport=5001) / Raw(bytes(3001))
    fragments = fragment(whole, 1480)  # type: ignore[no-untyped-call]
    link = Ether(dst="01:00:5e:01:01:01")
    for _ in range(tags):
        link /= Dot1Q(vlan=1)
    assert len(fragments) == 3
    assert all(run(program, bytes(link / part), MULTICAST) for part in fragments)
    last = IP(dst="239.1.1.1", proto=17, frag=185) / Raw(b"x")  # shorter than a port
    assert run(program, bytes(link / last).ljust(60, b"\0"), MULTICAST)


@pytest.mark.parametrize("count", [1, 300, 900, 1024])
def test_a_capture_of_any_rule_makes_a_program_that_the_kernel_takes(count: int) -> None:
    outputs = {(0xEF000000 + i * 7, 1 + i % 60_000) for i in range(count)}
    program = bpf.assemble_capture([(0xEE010101, 5001)], outputs)
    assert len(program) <= bpf.BPF_MAXINSNS
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        attach_filter(sock, program)
    assert all(run(program, frame(*output), OUTGOING) for output in outputs)
    assert run(program, frame(0xEF000001, 1), OUTGOING) == (count == 1024)  # too many for a filter: all that leaves
    assert run(program, frame(0xEE010101, 5001), MULTICAST)
