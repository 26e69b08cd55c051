"""Packet rings: opening the AF_PACKET socket of one worker on one interface, and its filter and statistics.

Privileged (CAP_NET_RAW). The supervisor owns the sockets; workers map them. A ring that no worker reads goes
on filling, so a worker that died is replaced without loss.
Source: man 7 packet, Documentation/networking/packet_mmap.rst, linux/if_packet.h.
"""

import ctypes
import mmap
import socket
import struct
from collections.abc import Sequence
from enum import IntEnum

import numpy as np

from relay import bpf
from relay.dataplane.layout import TP_STATUS_USER
from relay.errors import PreflightError, RelayError

SOL_PACKET = 263
PACKET_RX_RING = 5
PACKET_STATISTICS = 6
PACKET_COPY_THRESH = 7
PACKET_VERSION = 10
PACKET_VNET_HDR = 15
PACKET_FANOUT = 18
PACKET_IGNORE_OUTGOING = 23
TPACKET_V2 = 1
PACKET_FANOUT_FLAG_UNIQUEID = 0x2000
PACKET_FANOUT_FLAG_IGNORE_OUTGOING = 0x4000
PACKET_FANOUT_FLAG_DEFRAG = 0x8000
ETH_P_ALL = 0x0003
SO_ATTACH_FILTER = 26
SO_RCVBUFFORCE = 33
COPY_QUEUE_BYTES = 64 << 20  # the room of frames too large for a slot: 900 super-frames of 64 KiB, counted twice
BLOCK_BYTES = 1 << 20
FRAME_BYTES = 2048  # a slot: an Ethernet frame of 1 500 bytes with all headers


class Fanout(IntEnum):
    """How an interface's traffic is shared among workers, linux/if_packet.h."""

    hash = 0  # PACKET_FANOUT_HASH
    cpu = 2  # PACKET_FANOUT_CPU
    qm = 5  # PACKET_FANOUT_QM


def attach_filter(packet_socket: socket.socket, program: Sequence[bpf.Instruction]) -> None:
    """Replace the socket's filter at once, with no packet seen by neither. Raises OSError."""
    code = ctypes.create_string_buffer(bpf.encode(program))
    fprog = struct.pack("@HP", len(program), ctypes.addressof(code))
    packet_socket.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, fprog)


def open_ring(
    interface: str, ring_bytes: int, mode: Fanout | None, fanout_id: int | None
) -> tuple[socket.socket, int | None]:
    """Open a ring that admits nothing yet; return its socket and the id of its fanout group.

    `fanout_id` None makes a new group. The group always has DEFRAG, so that fragments arrive as one datagram. `mode`
    None: the ring is in no group. It gets fragments as they are: two groups with DEFRAG would take each other's, as the
    kernel reassembles a datagram once for all packet sockets of a namespace (ip_check_defrag, net/ipv4/ip_fragment.c).
    Raises PreflightError without privileges, RelayError when the kernel refuses.
    """
    try:
        ring = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    except PermissionError:
        raise PreflightError("no CAP_NET_RAW for packet sockets: start as root, or grant it") from None
    except OSError as error:
        raise RelayError(f"packet ring on {interface}: {error.strerror}") from error
    try:
        ring.setsockopt(SOL_PACKET, PACKET_VERSION, TPACKET_V2)
        ring.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        ring.setsockopt(SOL_PACKET, PACKET_COPY_THRESH, 1)
        ring.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        ring.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, COPY_QUEUE_BYTES)
        request = struct.pack("@IIII", BLOCK_BYTES, ring_bytes // BLOCK_BYTES, FRAME_BYTES, ring_bytes // FRAME_BYTES)
        ring.setsockopt(SOL_PACKET, PACKET_RX_RING, request)
        attach_filter(ring, bpf.REJECT_ALL)
        ring.bind((interface, ETH_P_ALL))
        if mode is None:
            return ring, None
        # A fanout group has flags of its own: without this one it would take in what the host sends.
        flags = PACKET_FANOUT_FLAG_DEFRAG | PACKET_FANOUT_FLAG_IGNORE_OUTGOING
        flags |= PACKET_FANOUT_FLAG_UNIQUEID if fanout_id is None else 0
        ring.setsockopt(SOL_PACKET, PACKET_FANOUT, struct.pack("@HH", fanout_id or 0, mode | flags))
        value = ring.getsockopt(SOL_PACKET, PACKET_FANOUT, 4)
    except OSError as error:
        ring.close()
        raise RelayError(f"packet ring on {interface}: {error.strerror}") from error
    return ring, struct.unpack("@I", value)[0] & 0xFFFF


def is_bound(ring: socket.socket) -> bool:
    """Whether the ring's interface is the one that it was opened on. The kernel unbinds a ring whose interface goes,
    and never binds it to one that comes back, whatever its name and index.
    """
    return bool(ring.getsockname()[0])


def count_filled(ring: socket.socket, ring_bytes: int) -> int:
    """The frames in a ring that nobody has read. Raises OSError."""
    with mmap.mmap(ring.fileno(), ring_bytes, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
        statuses = np.frombuffer(mapped, np.uint32)[:: FRAME_BYTES // 4]
        filled = int(np.count_nonzero(statuses & TP_STATUS_USER))
        del statuses
    return filled


def take_ring_drops(ring: socket.socket) -> int:
    """Frames that found the ring full since the last call: the kernel's counter resets when read."""
    _, drops = struct.unpack("@II", ring.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
    return int(drops)
