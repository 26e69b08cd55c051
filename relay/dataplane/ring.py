"""Ring: the kernel's TPACKET_V2 ring of one interface, from slot to frame and back.

The kernel owns a slot while its status is TP_STATUS_KERNEL, this worker while it has TP_STATUS_USER.
Frames too large for a slot wait whole in the socket's receive queue, in slot order; they are fetched
into the copy arena and compared with what the slot holds, so that none is taken for another.
Source: Documentation/networking/packet_mmap.rst, net/packet/af_packet.c (tpacket_rcv).
"""

from typing import Any

from numba import njit

from logging_shm.atomics import int64, load_acquire_u32, load_u8, load_u16, load_u32, store_release_u32
from relay.dataplane.layout import (
    PACKET_OTHERHOST,
    SOCKADDR_LL,
    TP_STATUS_COPY,
    TP_STATUS_CSUM_VALID,
    TP_STATUS_CSUMNOTREADY,
    TP_STATUS_USER,
    TPACKET2_HDR,
    VIRTIO_NET_HDR,
    DropCause,
    offset_of,
)
from relay.dataplane.memory import COPY_SLOT_BYTES, COPY_SLOTS
from relay.dataplane.parse import parse
from relay.dataplane.syscalls import recvmmsg

TP_LEN = offset_of(TPACKET2_HDR, "tp_len")
TP_SNAPLEN = offset_of(TPACKET2_HDR, "tp_snaplen")
TP_MAC = offset_of(TPACKET2_HDR, "tp_mac")
PKTTYPE = TPACKET2_HDR.itemsize + offset_of(SOCKADDR_LL, "sll_pkttype")
VNET_BYTES = VIRTIO_NET_HDR.itemsize
VNET_GSO_TYPE = offset_of(VIRTIO_NET_HDR, "gso_type")
VNET_GSO_SIZE = offset_of(VIRTIO_NET_HDR, "gso_size")
NO_SLOT = -1
COMPARED_BYTES_MAX = 256  # both headers and more payload than two neighbours of a stream share
MSG_DONTWAIT = 0x40
TRUNCATED = int(DropCause.TRUNCATED)
NO_MATCH = int(DropCause.NO_MATCH)


@njit(cache=True, nogil=True, _nrt=False)
def slot_address(ring: Any, position: int) -> int:
    """The address of a slot, `position` frames after the cursor."""
    return ring.base + ((ring.cursor + position) % ring.frames) * ring.frame_bytes


@njit(cache=True, nogil=True, _nrt=False)
def is_filled(slot: int) -> bool:
    """Whether the kernel has handed this slot over."""
    return (int64(load_acquire_u32(slot)) & TP_STATUS_USER) != 0


@njit(cache=True, nogil=True, _nrt=False)
def fetch_copies(m: Any, ring_index: int) -> None:
    """Refill this ring's copy arena with frames from the socket's receive queue. None of it is in use."""
    ring = m.rings[ring_index]
    count = recvmmsg(
        ring.fd, m.copy_mmsg.ctypes.data + ring_index * m.copy_mmsg.strides[0], COPY_SLOTS, MSG_DONTWAIT, 0
    )
    ring.copy_next = 0
    ring.copy_count = max(count, 0)


@njit(cache=True, nogil=True, _nrt=False)
def copy_is_of_slot(m: Any, ring_index: int, slot: int) -> bool:
    """Whether the next fetched frame is the one whose beginning `slot` holds."""
    ring = m.rings[ring_index]
    copy = m.copy_iovecs[ring_index, ring.copy_next].iov_base + VNET_BYTES
    copy_bytes = int64(m.copy_mmsg[ring_index, ring.copy_next].msg_len) - VNET_BYTES
    if copy_bytes != int64(load_u32(slot + TP_LEN)):
        return False
    head = slot + int64(load_u16(slot + TP_MAC))
    compared_bytes = min(int64(load_u32(slot + TP_SNAPLEN)), COMPARED_BYTES_MAX)
    for i in range(compared_bytes):
        if load_u8(head + i) != load_u8(copy + i):
            return False
    return True


@njit(cache=True, nogil=True, _nrt=False)
def needs_fetch(m: Any, ring_index: int, slot: int) -> bool:
    """Whether the frame of `slot` is a copy and the arena has none left: drain, then `fetch_copies`."""
    ring = m.rings[ring_index]
    return (int64(load_u32(slot)) & TP_STATUS_COPY) != 0 and ring.copy_next >= ring.copy_count


@njit(cache=True, nogil=True, _nrt=False)
def read_frame(m: Any, ring_index: int, slot: int) -> int:
    """Parse the frame of a filled slot into `m.datagram[0]`; return its DropCause."""
    ring = m.rings[ring_index]
    status = int64(load_u32(slot))
    frame = slot + int64(load_u16(slot + TP_MAC))
    frame_bytes = int64(load_u32(slot + TP_SNAPLEN))
    m.datagram[0].datagrams = 1
    m.datagram[0].payload_bytes = 0
    if status & TP_STATUS_COPY:
        if ring.copy_next >= ring.copy_count or not copy_is_of_slot(m, ring_index, slot):
            return TRUNCATED
        frame = m.copy_iovecs[ring_index, ring.copy_next].iov_base + VNET_BYTES
        frame_bytes = int64(m.copy_mmsg[ring_index, ring.copy_next].msg_len) - VNET_BYTES
        ring.copy_next += 1
        if frame_bytes > COPY_SLOT_BYTES - VNET_BYTES:
            return TRUNCATED
    elif frame_bytes < int64(load_u32(slot + TP_LEN)):
        return TRUNCATED
    if load_u8(slot + PKTTYPE) == PACKET_OTHERHOST:
        return NO_MATCH
    return parse(
        frame,
        frame_bytes,
        int64(load_u8(frame - VNET_BYTES + VNET_GSO_TYPE)),
        int64(load_u16(frame - VNET_BYTES + VNET_GSO_SIZE)),
        (status & (TP_STATUS_CSUM_VALID | TP_STATUS_CSUMNOTREADY)) != 0,
        m.datagram[0],
    )


@njit(cache=True, nogil=True, _nrt=False)
def release(ring: Any) -> None:
    """Give the frames of this pass back to the kernel, in order, once nothing reads them any more."""
    for i in range(ring.taken):
        store_release_u32(slot_address(ring, i), 0)
    ring.cursor = (ring.cursor + ring.taken) % ring.frames
    ring.taken = 0


@njit(cache=True, nogil=True, _nrt=False)
def find_cursor(base: int, frames: int, frame_bytes: int, sent: int) -> int:
    """Where to go on in a ring that was read before; all arguments but `base` count slots or bytes.

    `sent` is the slot after the last frame that the former reader handed to the kernel. Frames before it that
    it could not give back any more are given back here. They begin at the first filled slot after an empty
    one; where all are filled, or none is, `sent` alone tells.
    """
    cursor = NO_SLOT
    previous = is_filled(base + (frames - 1) * frame_bytes)
    for i in range(frames):
        filled = is_filled(base + i * frame_bytes)
        if filled and not previous:
            cursor = i
            break
        previous = filled
    if cursor == NO_SLOT:
        return sent
    for _ in range((sent - cursor) % frames):
        if not is_filled(base + cursor * frame_bytes):
            break
        store_release_u32(base + cursor * frame_bytes, 0)
        cursor = (cursor + 1) % frames
    return cursor
