"""The classic BPF filter of a ring, assembled from the inputs that its rules listen to. Pure.

It keeps other traffic out of the ring; what it lets through is matched again by the worker, so it may admit
more than the rules ask for, never less. Frames whose headers are cut pass, so that they are counted.
Source: Documentation/networking/filter.rst, linux/bpf_common.h; RFC 8200.
"""

import socket
import struct
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

Instruction = tuple[int, int, int, int]  # struct sock_filter: code, jt, jf, k
Code = list[Instruction]
Input = tuple[str, int]  # destination address, IPv4 or IPv6, and port
Words = tuple[int, int, int, int]  # an IPv6 address
WORDS = struct.Struct(">4I")

BPF_MAXINSNS = 4096
LD_BYTE_ABS = 0x30
LD_HALF_ABS = 0x28
LD_WORD_IND = 0x40
LD_HALF_IND = 0x48
LD_BYTE_IND = 0x50
LD_LENGTH = 0x80
LD_IMM = 0x00
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
NEXT_HEADER = 1  # … and the one that holds what follows the IPv6 header
PORT_MAX = 65_535
PORT_UNKNOWN = PORT_MAX + 1  # in M[PORT]: it is behind extension headers
SKF_AD_PKTTYPE = 0xFFFFF000 + 4  # linux/filter.h: a load from here gives the packet's type
PACKET_OUTGOING = 4  # linux/if_packet.h
FRAGMENT_OFFSET_MASK = 0x1FFF  # IP_OFFSET, net/ip.h

ETH_P_IP = 0x0800
ETH_P_IPV6 = 0x86DD
ETH_P_8021Q = 0x8100
ETH_P_8021AD = 0x88A8
ETH_HLEN = 14
IPPROTO_UDP = 17
EXTENSION_HEADERS = (0, 43, 44, 60)  # hop-by-hop options, routing, fragment, destination options: linux/in6.h
FRAME_BYTES_MIN = 42  # Ethernet, IPv4 and UDP headers
IPV6_UDP_HEADER_BYTES = 48
IPV6_SOURCE, IPV6_DESTINATION = 8, 24  # offsets in the header
LOAD_DESTINATION: Instruction = (LD_WORD_IND, 0, 0, ETH_HLEN + 16)  # of the IPv4 header at X
ONLY_UDP: tuple[Instruction, ...] = ((LD_BYTE_IND, 0, 0, ETH_HLEN + 9), (JEQ_K, 1, 0, IPPROTO_UDP), REJECT)


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


def _locate_ipv4(of_cut: Instruction) -> Code:
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
    ]


def _locate_either(of_cut: Instruction, ipv6_behind: int) -> Code:
    """The same for IPv4, whose code follows, and for IPv6, whose code is so many instructions further behind."""
    return [
        (LD_LENGTH, 0, 0, 0),
        (JGE_K, 1, 0, FRAME_BYTES_MIN),
        of_cut,
        (LDX_IMM, 0, 0, 0),
        (LD_HALF_ABS, 0, 0, 12),
        (JEQ_K, 17, 0, ETH_P_IP),
        (JEQ_K, 15, 0, ETH_P_IPV6),
        (JEQ_K, 2, 0, ETH_P_8021Q),
        (JEQ_K, 1, 0, ETH_P_8021AD),
        REJECT,
        (LDX_IMM, 0, 0, 4),
        (LD_HALF_ABS, 0, 0, 16),
        (JEQ_K, 10, 0, ETH_P_IP),
        (JEQ_K, 8, 0, ETH_P_IPV6),
        (JEQ_K, 2, 0, ETH_P_8021Q),
        (JEQ_K, 1, 0, ETH_P_8021AD),
        REJECT,
        (LDX_IMM, 0, 0, 8),
        (LD_HALF_ABS, 0, 0, 20),
        (JEQ_K, 3, 0, ETH_P_IP),
        (JEQ_K, 1, 0, ETH_P_IPV6),
        REJECT,
        (JA, 0, 0, ipv6_behind),
    ]


def _load_port(of_cut: Instruction) -> Code:
    """M[PORT] = destination port, and A = destination address, of the IPv4 header at X. `of_cut` as there."""
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


def _only_udp_or_extended(of_cut: Instruction) -> Code:
    """M[NEXT_HEADER] = what follows the IPv6 header at X: UDP, or an extension header behind which it may be.

    Where such headers end is for the worker to find: classic BPF has no loops.
    """
    extensions: Code = [(JEQ_K, len(EXTENSION_HEADERS) - at, 0, header) for at, header in enumerate(EXTENSION_HEADERS)]
    return [
        (LD_BYTE_IND, 0, 0, ETH_HLEN + 6),
        (ST, 0, 0, NEXT_HEADER),
        (JEQ_K, len(EXTENSION_HEADERS) + 1, 0, IPPROTO_UDP),
        *extensions,
        REJECT,
        (LD_LENGTH, 0, 0, 0),
        (JGE_K, 1, 0, ETH_HLEN + IPV6_UDP_HEADER_BYTES),
        of_cut,
        (ALU_SUB_K, 0, 0, ETH_HLEN + IPV6_UDP_HEADER_BYTES),
        (JGE_X, 1, 0, 0),
        of_cut,
    ]


LOAD_PORT_IPV6: Code = [
    (LD_MEM, 0, 0, NEXT_HEADER),
    (JEQ_K, 2, 0, IPPROTO_UDP),
    (LD_IMM, 0, 0, PORT_UNKNOWN),
    (JA, 0, 0, 1),
    (LD_HALF_IND, 0, 0, ETH_HLEN + 40 + 2),
    (ST, 0, 0, PORT),
]


def _load_word(offset: int, word: int) -> Instruction:
    """A = one of the four words of the address at this offset of the IPv6 header at X."""
    return LD_WORD_IND, 0, 0, ETH_HLEN + offset + 4 * word


def _require(value: int, then: Code) -> Code:
    """Go on with `then`, which ends with a rejection, only if A is `value`."""
    if len(then) - 1 <= JUMP_MAX:
        return [(JEQ_K, 0, len(then) - 1, value), *then]
    return [(JEQ_K, 1, 0, value), REJECT, *then]


def _search_words(addresses: Sequence[Words], leaf: Callable[[Words], Code], words: Sequence[int] = range(4)) -> Code:
    """Search the destination of the IPv6 header at X among `addresses`, of which these words are still to be compared.

    What all have in common is compared once, before them: groups tend to differ in their last word alone. Then the
    word is searched that tells most of them apart.
    """
    values = {word: {address[word] for address in addresses} for word in words}
    common = [word for word in words if len(values[word]) == 1]
    rest = [word for word in words if len(values[word]) > 1]
    if not rest:
        code = leaf(addresses[0])
    else:
        best = max(rest, key=lambda word: len(values[word]))
        others = [word for word in rest if word != best]
        having: dict[int, list[Words]] = {}
        for address in addresses:
            having.setdefault(address[best], []).append(address)
        found = {value: _require(value, _search_words(some, leaf, others)) for value, some in having.items()}
        code = [_load_word(IPV6_DESTINATION, best), *_search(sorted(found), found.__getitem__)]
    for word in reversed(common):
        code = [_load_word(IPV6_DESTINATION, word), *_require(addresses[0][word], code)]
    return code


def _accept_port(ports: Sequence[int]) -> Code:
    """Search M[PORT] among sorted `ports`, of which one that is not known is taken for any."""
    by_port = _search(ports, _accept_if_equal)
    return [(LD_MEM, 0, 0, PORT), (JGT_K, by_port.index(ACCEPT), 0, PORT_MAX), *by_port]


def _is_source(source: str) -> Code:
    """Reject what is not from this address, of the header at X."""
    if ":" not in source:
        return [(LD_WORD_IND, 0, 0, ETH_HLEN + 12), (JEQ_K, 1, 0, _number(source)), REJECT]
    code: Code = []
    for word, value in enumerate(_words(source)):
        code += [_load_word(IPV6_SOURCE, word), (JEQ_K, 1, 0, value), REJECT]
    return code


def _number(address: str) -> int:
    return int.from_bytes(socket.inet_pton(socket.AF_INET, address), "big")


def _words(address: str) -> Words:
    return WORDS.unpack(socket.inet_pton(socket.AF_INET6, address))


class _Inputs(NamedTuple):
    """Ports by destination address, all sorted."""

    ipv4: dict[int, list[int]]
    ipv6: dict[Words, list[int]]


def _sort(inputs: Collection[Input]) -> _Inputs:
    ipv4: dict[int, list[int]] = {}
    ipv6: dict[Words, list[int]] = {}
    for number, port in sorted({(_number(address), port) for address, port in inputs if ":" not in address}):
        ipv4.setdefault(number, []).append(port)
    for words, port in sorted({(_words(address), port) for address, port in inputs if ":" in address}):
        ipv6.setdefault(words, []).append(port)
    return _Inputs(ipv4, ipv6)


def _best(stages: Sequence[Sequence[Code]], room: int) -> list[Code]:
    """Of each part the first stage that leaves room for the others: the largest gives way, as long as it can."""
    chosen = [0] * len(stages)
    while sum(len(part[at]) for part, at in zip(stages, chosen, strict=True)) > room:
        giving = [index for index, part in enumerate(stages) if chosen[index] + 1 < len(part)]
        chosen[max(giving, key=lambda index: len(stages[index][chosen[index]]))] += 1
    return [part[at] for part, at in zip(stages, chosen, strict=True)]


def _either(ipv4: Sequence[Code], ipv6: Sequence[Code], of_cut: Instruction, room: int) -> Code:
    """Tell the versions apart; each goes on with its best stage for which there is room, from exact to all UDP.

    Without stages a version is rejected.
    """
    if not ipv6:
        head = _locate_ipv4(of_cut)
        return [*head, *_best([ipv4], room - len(head))[0]]
    room -= len(_locate_either(of_cut, 0))
    first, second = _best([ipv4 or [[REJECT]], ipv6], room)
    return [*_locate_either(of_cut, len(first)), *first, *second]


def assemble(inputs: Collection[Input]) -> tuple[Instruction, ...]:
    """The filter for `inputs`, pairs of destination address, IPv4 or IPv6, and port.

    More inputs than a filter can hold are told apart by address alone, still more not at all. So are IPv6 datagrams
    with extension headers, which hide the port. Raises OSError for an address that is none.
    """
    if not inputs:
        return REJECT_ALL
    ports = _sort(inputs)
    ipv4: list[Code] = []
    if ports.ipv4:
        ipv4 = [
            [*ONLY_UDP, *_load_port(ACCEPT), *_search_both(ports.ipv4)],
            [*ONLY_UDP, LOAD_DESTINATION, *_search(list(ports.ipv4), _accept_if_equal)],
            [*ONLY_UDP, ACCEPT],
        ]
    return tuple(_either(ipv4, _stages_ipv6(ports.ipv6, ACCEPT), ACCEPT, BPF_MAXINSNS))


def _stages_ipv6(ports: dict[Words, list[int]], of_cut: Instruction, source: str | None = None) -> list[Code]:
    if not ports:
        return []
    head = [*_only_udp_or_extended(of_cut), *(_is_source(source) if source else ())]
    return [
        [*head, *LOAD_PORT_IPV6, *_search_words(list(ports), lambda address: _accept_port(ports[address]))],
        [*head, *_search_words(list(ports), lambda _: [ACCEPT, REJECT])],
        [*head, ACCEPT],
    ]


def _destinations(wanted: Collection[Input], source: str | None, room: int) -> Code:
    """Accept datagrams to `wanted`, by address alone where the code would be longer than `room`, and their fragments.

    A fragment that is not the first has no port, so all of them to the address are accepted.
    """
    if source is not None:
        wanted = [pair for pair in wanted if (":" in pair[0]) == (":" in source)]
    if not wanted:
        return [REJECT]
    ports = _sort(wanted)
    ipv4: list[Code] = []
    if ports.ipv4:
        head = [*ONLY_UDP, *(_is_source(source) if source else ())]
        by_address = [LOAD_DESTINATION, *_search(list(ports.ipv4), _accept_if_equal)]
        exact = [
            *head,
            (LD_HALF_IND, 0, 0, ETH_HLEN + 6),
            (ALU_AND_K, 0, 0, FRAGMENT_OFFSET_MASK),
            (JEQ_K, 0, 1, 0),
            (JA, 0, 0, len(by_address)),
            *by_address,
            *_load_port(REJECT),
            *_search_both(ports.ipv4),
        ]
        ipv4 = [exact, [*head, *by_address], [*head, ACCEPT]]
    return _either(ipv4, _stages_ipv6(ports.ipv6, REJECT, source), REJECT, room)


def assemble_capture(
    incoming: Collection[Input], outgoing: Collection[Input], source: str | None = None
) -> tuple[Instruction, ...]:
    """The filter of a capture: what arrives for `incoming`, from `source` if given, and what leaves for `outgoing`.

    Pairs of destination address and port as for `assemble`. Nothing else is let through, but for fragments, see
    `_destinations`, IPv6 datagrams with extension headers, and where there are more destinations than a filter can
    hold. Raises OSError for an address that is none.
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
