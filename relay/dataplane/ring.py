"""Ring: the kernel's TPACKET_V2 ring of one interface, from slot to frame and back.

The kernel owns a slot while its status is TP_STATUS_KERNEL, this worker while it has TP_STATUS_USER.
Frames too large for a slot wait whole in the socket's receive queue, in slot order; they are fetched
into the copy arena and compared with what the slot holds, so that none is taken for another. What a worker had
fetched and not sent when it died is in the arena still, for its successor.
Source: Documentation/networking/packet_mmap.rst, net/packet/af_packet.c (tpacket_rcv).
"""

from typing import Any

from logging_shm.atomics import (
    int64,
    load_acquire_u32,
    load_i64,
    load_u8,
    load_u16,
    load_u32,
    prefetch_read,
    store_release_u32,
)
from logging_shm.jit import compiled
from logging_shm.layout import CACHE_LINE_BYTES
from relay.dataplane.copies import COPY_SLOT_BYTES, COPY_SLOTS
from relay.dataplane.layout import (
    MMSGHDR,
    MSG_DONTWAIT,
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
from relay.dataplane.memory import i64_at, iovec_at, mmsg_at, ring_at
from relay.dataplane.parse import parse
from relay.dataplane.syscalls import recvmmsg

TP_LEN = offset_of(TPACKET2_HDR, "tp_len")
TP_SNAPLEN = offset_of(TPACKET2_HDR, "tp_snaplen")
TP_MAC = offset_of(TPACKET2_HDR, "tp_mac")
PKTTYPE = TPACKET2_HDR.itemsize + offset_of(SOCKADDR_LL, "sll_pkttype")
VNET_BYTES = VIRTIO_NET_HDR.itemsize
VNET_GSO_TYPE = offset_of(VIRTIO_NET_HDR, "gso_type")
VNET_GSO_SIZE = offset_of(VIRTIO_NET_HDR, "gso_size")
MMSG_BYTES = MMSGHDR.itemsize
NO_SLOT = -1
COMPARED_BYTES_MAX = 256  # both headers and more payload than two neighbours of a stream share
TRUNCATED = int(DropCause.TRUNCATED)
NO_MATCH = int(DropCause.NO_MATCH)


@compiled
def is_filled(slot: int) -> bool:
    """Whether the kernel has handed this slot over."""
    return (int64(load_acquire_u32(slot)) & TP_STATUS_USER) != 0


@compiled
def prefetch_frame(slot: int) -> None:
    """Have the lines of a slot that hold its header and the frame's headers fetched from the core that wrote them."""
    prefetch_read(slot)
    prefetch_read(slot + CACHE_LINE_BYTES)


@compiled
def fetch_copies(m: Any, ring_index: int) -> None:
    """Refill this ring's copy arena with frames from the socket's receive queue. None of it is in use."""
    ring = ring_at(m.rings, ring_index)
    first = ring_index * COPY_SLOTS
    for index in range(first, first + COPY_SLOTS):
        mmsg_at(m.copy_mmsg, index).msg_len = 0
        i64_at(m.copy_places, index).value = 0
    ring.copy_next = 0
    ring.copy_count = max(recvmmsg(ring.fd, m.copy_mmsg + first * MMSG_BYTES, COPY_SLOTS, MSG_DONTWAIT, 0), 0)


@compiled
def resume_copies(m: Any, ring_index: int) -> None:
    """Go on in the arena where the former reader of this ring left off: with what it had not sent.

    `ring.cursor` is where its frames go on. Of copies that it had parsed, those for slots from there on are parsed
    again. What the arena says is not believed: the first copy must be that of its slot.
    """
    ring = ring_at(m.rings, ring_index)
    first = ring_index * COPY_SLOTS
    ring.copy_count = 0
    for index in range(first, first + COPY_SLOTS):
        if not VNET_BYTES < int64(mmsg_at(m.copy_mmsg, index).msg_len) <= COPY_SLOT_BYTES:
            break
        ring.copy_count += 1
    ring.copy_next = 0
    for index in range(first, first + ring.copy_count):
        place = i64_at(m.copy_places, index).value
        # A pass takes half of the slots at most: what is further ahead than that was parsed before.
        if place == 0 or (place - 1 - ring.cursor) % ring.frames < ring.frames // 2:
            break
        ring.copy_next += 1
    if ring.copy_next == ring.copy_count:
        return
    index = first + ring.copy_next
    copy = iovec_at(m.copy_iovecs, index).iov_base + VNET_BYTES
    copy_bytes = int64(mmsg_at(m.copy_mmsg, index).msg_len) - VNET_BYTES
    for ahead in range(ring.frames):
        slot = ring.base + (ring.cursor + ahead) % ring.frames * ring.frame_bytes
        if not is_filled(slot):
            return
        if int64(load_u32(slot)) & TP_STATUS_COPY:
            if not copy_is_of_slot(copy, copy_bytes, slot):
                ring.copy_next = ring.copy_count
            return


@compiled
def copy_is_of_slot(copy: int, copy_bytes: int, slot: int) -> bool:
    """Whether the fetched frame at `copy` is the one whose beginning `slot` holds.

    Of a frame that is larger than the arena's slots, the arena has the beginning.
    """
    if copy_bytes != min(int64(load_u32(slot + TP_LEN)), COPY_SLOT_BYTES - VNET_BYTES):
        return False
    head = slot + int64(load_u16(slot + TP_MAC))
    compared_bytes = min(int64(load_u32(slot + TP_SNAPLEN)), COMPARED_BYTES_MAX)
    for at in range(0, compared_bytes - 7, 8):
        if load_i64(head + at) != load_i64(copy + at):
            return False
    for at in range(compared_bytes & ~7, compared_bytes):
        if load_u8(head + at) != load_u8(copy + at):
            return False
    return True


@compiled
def needs_fetch(ring: Any, slot: int) -> bool:
    """Whether the frame of `slot` is a copy and the arena has none left: drain, then `fetch_copies`."""
    return (int64(load_u32(slot)) & TP_STATUS_COPY) != 0 and ring.copy_next >= ring.copy_count


@compiled
def read_frame(m: Any, ring: Any, ring_index: int, slot: int) -> int:
    """Parse the frame of a filled slot into `m.datagram`; return its DropCause."""
    status = int64(load_u32(slot))
    frame = slot + int64(load_u16(slot + TP_MAC))
    frame_bytes = int64(load_u32(slot + TP_SNAPLEN))
    datagram = m.datagram
    datagram.datagrams = 1
    datagram.payload_bytes = 0
    if status & TP_STATUS_COPY:
        if ring.copy_next >= ring.copy_count:
            return TRUNCATED
        index = ring_index * COPY_SLOTS + ring.copy_next
        frame = iovec_at(m.copy_iovecs, index).iov_base + VNET_BYTES
        frame_bytes = int64(mmsg_at(m.copy_mmsg, index).msg_len) - VNET_BYTES
        if not copy_is_of_slot(frame, frame_bytes, slot):
            return TRUNCATED
        i64_at(m.copy_places, index).value = (slot - ring.base) // ring.frame_bytes + 1
        ring.copy_next += 1
    if frame_bytes < int64(load_u32(slot + TP_LEN)):
        return TRUNCATED
    if load_u8(slot + PKTTYPE) == PACKET_OTHERHOST:
        return NO_MATCH
    return parse(
        frame,
        frame_bytes,
        int64(load_u8(frame - VNET_BYTES + VNET_GSO_TYPE)),
        int64(load_u16(frame - VNET_BYTES + VNET_GSO_SIZE)),
        (status & (TP_STATUS_CSUM_VALID | TP_STATUS_CSUMNOTREADY)) != 0,
        datagram,
    )


@compiled
def release(m: Any, ring: Any, ring_index: int) -> None:
    """Give the frames of this pass back to the kernel, in order, once nothing reads them any more."""
    if ring.copy_count and ring.copy_next >= ring.copy_count:
        mmsg_at(m.copy_mmsg, ring_index * COPY_SLOTS).msg_len = 0
        ring.copy_next = ring.copy_count = 0
    position = ring.cursor
    for _ in range(ring.taken):
        store_release_u32(ring.base + position * ring.frame_bytes, 0)
        position += 1
        if position == ring.frames:
            position = 0
    ring.cursor = position
    ring.taken = 0


@compiled
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
