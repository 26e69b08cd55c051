"""The classic BPF filter of a ring, assembled from the inputs that its rules listen to. Pure.

It keeps other traffic out of the ring; what it lets through is matched again by the worker, so it may admit
more than the rules ask for, never less. Frames whose headers are cut pass, so that they are counted.
Source: Documentation/networking/filter.rst, linux/bpf_common.h.
"""

import struct
from collections.abc import Callable, Collection, Sequence

Instruction = tuple[int, int, int, int]  # struct sock_filter: code, jt, jf, k
Code = list[Instruction]

BPF_MAXINSNS = 4096
LD_BYTE_ABS = 0x30
LD_HALF_ABS = 0x28
LD_WORD_IND = 0x40
LD_HALF_IND = 0x48
LD_BYTE_IND = 0x50
LD_LENGTH = 0x80
LD_MEM = 0x60
ST = 0x02
LDX_IMM = 0x01
TAX = 0x07
ALU_AND_K = 0x54
ALU_LSH_K = 0x64
ALU_SUB_K = 0x14
ALU_ADD_X = 0x0C
JA = 0x05
JEQ_K = 0x15
JGE_K = 0x35
JGT_K = 0x25
JGE_X = 0x3D
RET_K = 0x06

JUMP_MAX = 255
ACCEPT: Instruction = (RET_K, 0, 0, 0xFFFFFFFF)
REJECT: Instruction = (RET_K, 0, 0, 0)
REJECT_ALL: tuple[Instruction, ...] = (REJECT,)
PORT = 0  # the scratch cell that holds the destination port
SKF_AD_PKTTYPE = 0xFFFFF000 + 4  # linux/filter.h: a load from here gives the packet's type
PACKET_OUTGOING = 4  # linux/if_packet.h
FRAGMENT_OFFSET_MASK = 0x1FFF  # IP_OFFSET, net/ip.h

ETH_P_IP = 0x0800
ETH_P_8021Q = 0x8100
ETH_P_8021AD = 0x88A8
ETH_HLEN = 14
IPPROTO_UDP = 17
FRAME_BYTES_MIN = 42  # Ethernet, IPv4 and UDP headers


def _search(keys: Sequence[int], leaf: Callable[[int], Code]) -> Code:
    """Binary search of A over sorted `keys`; `leaf` makes the code for one of them."""
    if len(keys) == 1:
        return leaf(keys[0])
    middle = len(keys) // 2
    low, high = _search(keys[:middle], leaf), _search(keys[middle:], leaf)
    if len(low) <= JUMP_MAX:
        return [(JGT_K, len(low), 0, keys[middle - 1]), *low, *high]
    return [(JGT_K, 0, 1, keys[middle - 1]), (JA, 0, 0, len(low)), *low, *high]


def _accept_if_equal(key: int) -> Code:
    return [(JEQ_K, 0, 1, key), ACCEPT, REJECT]


def _search_both(ports: dict[int, list[int]]) -> Code:
    """Search A among the addresses, then M[PORT] among the sorted ports of that one."""

    def leaf(address: int) -> Code:
        by_port = _search(ports[address], _accept_if_equal)
        return [(JEQ_K, 1, 0, address), REJECT, (LD_MEM, 0, 0, PORT), *by_port]

    return _search(list(ports), leaf)


def _locate_ip(of_cut: Instruction = ACCEPT) -> Code:
    """X = bytes of VLAN tags before the IPv4 header; other protocols are rejected. `of_cut` says what of cut frames."""
    return [
        (LD_LENGTH, 0, 0, 0),
        (JGE_K, 1, 0, FRAME_BYTES_MIN),
        of_cut,
        (LDX_IMM, 0, 0, 0),
        (LD_HALF_ABS, 0, 0, 12),
        (JEQ_K, 13, 0, ETH_P_IP),
        (JEQ_K, 2, 0, ETH_P_8021Q),
        (JEQ_K, 1, 0, ETH_P_8021AD),
        REJECT,
        (LDX_IMM, 0, 0, 4),
        (LD_HALF_ABS, 0, 0, 16),
        (JEQ_K, 7, 0, ETH_P_IP),
        (JEQ_K, 2, 0, ETH_P_8021Q),
        (JEQ_K, 1, 0, ETH_P_8021AD),
        REJECT,
        (LDX_IMM, 0, 0, 8),
        (LD_HALF_ABS, 0, 0, 20),
        (JEQ_K, 1, 0, ETH_P_IP),
        REJECT,
        (LD_BYTE_IND, 0, 0, ETH_HLEN + 9),
        (JEQ_K, 1, 0, IPPROTO_UDP),
        REJECT,
    ]


def _load_port(of_cut: Instruction = ACCEPT) -> Code:
    """M[PORT] = destination port, and A = destination address, of the IPv4 header at X. `of_cut` as for _locate_ip."""
    return [
        (LD_WORD_IND, 0, 0, ETH_HLEN + 16),
        (ST, 0, 0, PORT + 1),
        (LD_BYTE_IND, 0, 0, ETH_HLEN),
        (ALU_AND_K, 0, 0, 0x0F),
        (ALU_LSH_K, 0, 0, 2),
        (ALU_ADD_X, 0, 0, 0),
        (TAX, 0, 0, 0),
        (LD_LENGTH, 0, 0, 0),
        (ALU_SUB_K, 0, 0, ETH_HLEN + 4),
        (JGE_X, 1, 0, 0),
        of_cut,
        (LD_HALF_IND, 0, 0, ETH_HLEN + 2),
        (ST, 0, 0, PORT),
        (LD_MEM, 0, 0, PORT + 1),
    ]


def assemble(inputs: Collection[tuple[int, int]]) -> tuple[Instruction, ...]:
    """The filter for `inputs`, pairs of destination address and port in host order.

    More inputs than a filter can hold are told apart by address alone, still more not at all.
    """
    if not inputs:
        return REJECT_ALL
    ports: dict[int, list[int]] = {}
    for address, port in sorted(set(inputs)):
        ports.setdefault(address, []).append(port)

    head = _locate_ip()
    exact = [*head, *_load_port(), *_search_both(ports)]
    if len(exact) <= BPF_MAXINSNS:
        return tuple(exact)
    by_address = [*head, (LD_WORD_IND, 0, 0, ETH_HLEN + 16), *_search(list(ports), _accept_if_equal)]
    if len(by_address) <= BPF_MAXINSNS:
        return tuple(by_address)
    return (*head, ACCEPT)


def _destinations(wanted: Collection[tuple[int, int]], source: int | None, room: int) -> Code:
    """Accept datagrams to `wanted`, by address alone where the code would be longer than `room`, and their fragments.

    A fragment that is not the first has no port, so all of them to the address are accepted.
    """
    if not wanted:
        return [REJECT]
    ports: dict[int, list[int]] = {}
    for address, port in sorted(set(wanted)):
        ports.setdefault(address, []).append(port)
    head = _locate_ip(of_cut=REJECT)
    if source is not None:
        head += [(LD_WORD_IND, 0, 0, ETH_HLEN + 12), (JEQ_K, 1, 0, source), REJECT]
    by_address = [(LD_WORD_IND, 0, 0, ETH_HLEN + 16), *_search(list(ports), _accept_if_equal)]
    code = [
        *head,
        (LD_HALF_IND, 0, 0, ETH_HLEN + 6),
        (ALU_AND_K, 0, 0, FRAGMENT_OFFSET_MASK),
        (JEQ_K, 0, 1, 0),
        (JA, 0, 0, len(by_address)),
        *by_address,
        *_load_port(of_cut=REJECT),
        *_search_both(ports),
    ]
    if len(code) <= room:
        return code
    return [*head, *by_address] if len(head) + len(by_address) <= room else [*head, ACCEPT]


def assemble_capture(
    incoming: Collection[tuple[int, int]], outgoing: Collection[tuple[int, int]], source: int | None = None
) -> tuple[Instruction, ...]:
    """The filter of a capture: what arrives for `incoming`, from `source` if given, and what leaves for `outgoing`.

    Pairs of destination address and port as for `assemble`. Nothing else is let through, but for fragments, see
    `_destinations`, and where there are more destinations than a filter can hold.
    """
    if not incoming and not outgoing:
        return REJECT_ALL
    head: Code = [(LD_BYTE_ABS, 0, 0, SKF_AD_PKTTYPE), (JEQ_K, 0, 1, PACKET_OUTGOING)]
    arriving = _destinations(incoming, source, BPF_MAXINSNS // 2)
    head.append((JA, 0, 0, len(arriving)))
    return (*head, *arriving, *_destinations(outgoing, None, BPF_MAXINSNS - len(head) - len(arriving)))


def encode(program: Sequence[Instruction]) -> bytes:
    """The program as an array of struct sock_filter."""
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
