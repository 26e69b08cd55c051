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


def _locate_ip() -> Code:
    """X = bytes of VLAN tags before the IPv4 header; other protocols are rejected."""
    return [
        (LD_LENGTH, 0, 0, 0),
        (JGE_K, 1, 0, FRAME_BYTES_MIN),
        ACCEPT,
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


def _load_port() -> Code:
    """M[PORT] = destination port, and A = destination address, of the IPv4 header at X."""
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
        ACCEPT,
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

    def leaf(address: int) -> Code:
        by_port = _search(ports[address], _accept_if_equal)
        return [(JEQ_K, 1, 0, address), REJECT, (LD_MEM, 0, 0, PORT), *by_port]

    head = _locate_ip()
    exact = [*head, *_load_port(), *_search(list(ports), leaf)]
    if len(exact) <= BPF_MAXINSNS:
        return tuple(exact)
    by_address = [*head, (LD_WORD_IND, 0, 0, ETH_HLEN + 16), *_search(list(ports), _accept_if_equal)]
    if len(by_address) <= BPF_MAXINSNS:
        return tuple(by_address)
    return (*head, ACCEPT)


def encode(program: Sequence[Instruction]) -> bytes:
    """The program as an array of struct sock_filter."""
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
