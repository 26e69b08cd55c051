"""A tap: one interface's packet ring of this process's own. Needs CAP_NET_RAW; the relay's rings know nothing of it.

TPACKET_V3: the kernel packs frames of any size into blocks and hands over a block when it is full or BLOCK_TIMEOUT_MS
old, so that super-frames of 64 KiB come whole. Source: man 7 packet, Documentation/networking/packet_mmap.rst,
linux/if_packet.h.
"""

import contextlib
import mmap
import socket
import struct
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import numpy as np

from relay import bpf
from relay.cli.capture.offload import ETH_P_8021Q, VirtioNetHdr, read_virtio
from relay.dataplane.layout import TP_STATUS_KERNEL, TP_STATUS_USER, TP_STATUS_VLAN_VALID, offset_of
from relay.errors import PreflightError, RelayError
from relay.supervisor.ingress import (
    ETH_P_ALL,
    PACKET_RX_RING,
    PACKET_STATISTICS,
    PACKET_VERSION,
    PACKET_VNET_HDR,
    SOL_PACKET,
    attach_filter,
)

TPACKET_V3 = 2
TP_STATUS_VLAN_TPID_VALID = 1 << 6
BLOCK_BYTES = 1 << 20
RING_BYTES = 64 << 20  # a second of 500 Mbit/s
FRAME_BYTES = 2048  # of no meaning for TPACKET_V3 but for the kernel's check
BLOCK_TIMEOUT_MS = 50
NS_PER_S = 1_000_000_000

TPACKET_REQ3: Final = np.dtype(
    [
        ("tp_block_size", "<u4"),
        ("tp_block_nr", "<u4"),
        ("tp_frame_size", "<u4"),
        ("tp_frame_nr", "<u4"),
        ("tp_retire_blk_tov", "<u4"),
        ("tp_sizeof_priv", "<u4"),
        ("tp_feature_req_word", "<u4"),
    ]
)
# struct tpacket_block_desc with struct tpacket_hdr_v1
TPACKET_BLOCK_DESC: Final = np.dtype(
    [
        ("version", "<u4"),
        ("offset_to_priv", "<u4"),
        ("block_status", "<u4"),
        ("num_pkts", "<u4"),
        ("offset_to_first_pkt", "<u4"),
        ("blk_len", "<u4"),
        ("seq_num", "<u8"),
        ("ts_first_pkt", "<u8"),
        ("ts_last_pkt", "<u8"),
    ]
)
TPACKET3_HDR: Final = np.dtype(
    [
        ("tp_next_offset", "<u4"),
        ("tp_sec", "<u4"),
        ("tp_nsec", "<u4"),
        ("tp_snaplen", "<u4"),
        ("tp_len", "<u4"),
        ("tp_status", "<u4"),
        ("tp_mac", "<u2"),
        ("tp_net", "<u2"),
        ("tp_rxhash", "<u4"),
        ("tp_vlan_tci", "<u4"),
        ("tp_vlan_tpid", "<u2"),
        ("tp_padding0", "<u2"),
        ("tp_padding", "u1", (8,)),
    ]
)
SLL_PKTTYPE = TPACKET3_HDR.itemsize + 10  # in the struct sockaddr_ll behind the header


def _struct_of(layout: np.dtype[Any]) -> struct.Struct:
    """The numbers of a layout, to be read faster than NumPy does."""
    names = [name for name in layout.names or () if name != "tp_padding"]
    return struct.Struct("<" + "".join({2: "H", 4: "I", 8: "Q"}[layout[name].itemsize] for name in names))


_BLOCK = _struct_of(TPACKET_BLOCK_DESC)
_HEADER = _struct_of(TPACKET3_HDR)
_STATUS_OFFSET = offset_of(TPACKET_BLOCK_DESC, "block_status")
_STATISTICS = struct.Struct("@III")  # struct tpacket_stats_v3: tp_packets, tp_drops, tp_freeze_q_cnt


class Frame(NamedTuple):
    """A frame as the tap saw it."""

    time_ns: int  # CLOCK_REALTIME
    data: bytes
    original_bytes: int
    packet_type: int  # sll_pkttype, man 7 packet
    left: VirtioNetHdr
    tag: tuple[int, int] | None  # TPID and TCI of a VLAN tag that the kernel took out


class Tap:
    """The ring of one interface. A context manager."""

    def __init__(self, interface: str, program: tuple[bpf.Instruction, ...]) -> None:
        """Begin to capture. Raises PreflightError without privileges, RelayError when the kernel refuses."""
        self.interface = interface
        self.accepted = 0  # frames that passed the filter
        self.dropped = 0  # of those, the ones for which the ring had no room
        self._block = 0
        try:
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        except PermissionError:
            raise PreflightError(
                "no CAP_NET_RAW for packet sockets: run `sudo mcrctl capture …`, or grant it"
            ) from None
        try:
            self._socket.setsockopt(SOL_PACKET, PACKET_VERSION, TPACKET_V3)
            self._socket.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
            blocks = RING_BYTES // BLOCK_BYTES
            request = struct.pack(
                "@7I", BLOCK_BYTES, blocks, FRAME_BYTES, RING_BYTES // FRAME_BYTES, BLOCK_TIMEOUT_MS, 0, 0
            )
            self._socket.setsockopt(SOL_PACKET, PACKET_RX_RING, request)
            self._map = mmap.mmap(self._socket.fileno(), RING_BYTES)
            attach_filter(self._socket, program)  # before bind: nothing else gets in
            self._socket.bind((interface, ETH_P_ALL))
        except OSError as error:
            self._socket.close()
            raise RelayError(
                f"capture on {interface}: {error.strerror}: run it in the relay's network namespace, "
                "while the interface exists"
            ) from error

    def fileno(self) -> int:
        """For poll: readable when a block has been handed over."""
        return self._socket.fileno()

    def has_more(self) -> bool:
        """Whether another block has been handed over."""
        return bool(self._map[self._block * BLOCK_BYTES + _STATUS_OFFSET] & TP_STATUS_USER)

    def take(self, blocks_max: int) -> Iterator[Frame]:
        """The frames of the blocks that were handed over."""
        for _ in range(blocks_max):
            if not self.has_more():
                return
            base = self._block * BLOCK_BYTES
            _, _, _, count, first, *_ = _BLOCK.unpack_from(self._map, base)
            yield from self._frames(base + first, count)
            struct.pack_into("<I", self._map, base + _STATUS_OFFSET, TP_STATUS_KERNEL)
            self._block = (self._block + 1) % (RING_BYTES // BLOCK_BYTES)

    def _frames(self, at: int, count: int) -> Iterator[Frame]:
        memory = self._map
        for _ in range(count):
            following, sec, nsec, kept, length, status, mac, _, _, tci, tpid, _ = _HEADER.unpack_from(memory, at)
            start = at + mac
            yield Frame(
                time_ns=sec * NS_PER_S + nsec,
                data=memory[start : start + kept],
                original_bytes=length,
                packet_type=memory[at + SLL_PKTTYPE],
                left=read_virtio(memory, start),
                tag=_tag(status, tpid, tci),
            )
            at += following

    def close_filter(self) -> None:
        """Let nothing more in: what has come so far is handed over within two BLOCK_TIMEOUT_MS."""
        attach_filter(self._socket, bpf.REJECT_ALL)

    def take_error(self) -> int:
        """The error that poll reports, such as ENETDOWN when the interface went down; 0 for none."""
        return self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)

    def count(self) -> None:
        """Add what the kernel counted since the last call: its numbers begin anew when they are read."""
        packets, drops, _ = _STATISTICS.unpack(self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, _STATISTICS.size))
        self.accepted += packets
        self.dropped += drops

    def close(self) -> None:
        """Give the ring back."""
        self._map.close()
        self._socket.close()

    def __enter__(self) -> "Tap":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.close()


def _tag(status: int, tpid: int, tci: int) -> tuple[int, int] | None:
    if not status & TP_STATUS_VLAN_VALID:
        return None
    return (tpid if status & TP_STATUS_VLAN_TPID_VALID else ETH_P_8021Q), tci
