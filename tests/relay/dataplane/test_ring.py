"""Where a new worker goes on in a ring whose reader died, whatever that one was doing."""

import ctypes
import math
import socket
import struct
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.dataplane import layout
from relay.dataplane.copies import COPIES_BYTES
from relay.dataplane.layout import (
    TP_STATUS_COPY,
    TP_STATUS_CSUM_VALID,
    TP_STATUS_KERNEL,
    TP_STATUS_USER,
    VIRTIO_NET_HDR,
)
from relay.dataplane.loop import publish_fill, watch_fills
from relay.dataplane.memory import SQ_ENTRIES, Memory, address_of
from relay.dataplane.ring import fetch_copies, find_cursor, needs_fetch, read_frame, release, resume_copies
from tests.relay.dataplane.bare import bare_memory

FRAME_BYTES = 64


def make_ring(frames: int, first: int, filled: int) -> Any:
    """A ring whose `filled` slots from `first` on hold frames; u4[frames, FRAME_BYTES / 4]."""
    ring = np.full((frames, FRAME_BYTES // 4), TP_STATUS_KERNEL, np.uint32)
    for i in range(filled):
        ring[(first + i) % frames, 0] = TP_STATUS_USER
    return ring


@given(st.integers(2, 40), st.data())
def test_frames_that_were_sent_are_given_back_and_no_other(frames: int, data: st.DataObject) -> None:
    """`held` frames lie in the ring from `first` on, of which the dead reader had sent the first `sent`."""
    first = data.draw(st.integers(0, frames - 1))
    held = data.draw(st.integers(1, frames - 1))
    sent = data.draw(st.integers(0, held))
    ring = make_ring(frames, first, held)
    cursor = find_cursor(address_of(ring), frames, FRAME_BYTES, (first + sent) % frames)
    assert cursor == (first + sent) % frames
    expected = make_ring(frames, first + sent, held - sent)
    assert (ring == expected).all()


@given(st.integers(1, 40), st.data())
def test_in_a_full_or_empty_ring_the_last_sent_frame_tells(frames: int, data: st.DataObject) -> None:
    sent = data.draw(st.integers(0, frames - 1))
    for filled in (0, frames):
        ring = make_ring(frames, 0, filled)
        assert find_cursor(address_of(ring), frames, FRAME_BYTES, sent) == sent
        assert (ring == make_ring(frames, 0, filled)).all()


@given(st.integers(1, 300), st.data())
def test_how_full_a_ring_is_is_found_wherever_it_begins(frames: int, data: st.DataObject) -> None:
    filled, first = data.draw(st.integers(0, frames)), data.draw(st.integers(0, frames - 1))
    slots = make_ring(frames, first, filled)
    state = bare_memory()
    ring, told = state["rings"][3], state["stats"][0]["ring_fill_percent"]
    ring["base"], ring["frames"], ring["frame_bytes"], ring["cursor"] = address_of(slots), frames, FRAME_BYTES, first
    ring["active"] = 1
    watch_fills(state.worker)
    assert (ring["fill_due"], told[3]) == (1, 0), "the next pass measures, before it gives slots back"
    watch_fills(state.worker)  # there was none in all that time
    assert told.tolist() == [0, 0, 0, math.ceil(100 * filled / frames), *[0] * (layout.RINGS_MAX - 4)]
    ring["fill_due"] = told[3] = 0
    ring["taken"] = filled
    publish_fill(state.worker, ring, 3)
    assert told[3] == math.ceil(100 * filled / frames)


# --- frames that do not fit their slots ---------------------------------------------------------------


SLOT_BYTES = 512
MAC = 128  # of a slot: where its frame begins
HEAD_BYTES = 200  # of a copied frame, in its slot
FRAMES_MAX = 32
LOG_BYTES = 16_384


def udp_frame(number: int, payload_bytes: int) -> bytes:
    """A datagram to 239.1.1.1:5001; the number comes first and last."""
    payload = number.to_bytes(4, "little").ljust(payload_bytes - 4, b"\x55") + number.to_bytes(4, "little")
    udp = struct.pack(">HHHH", 5000, 5001, 8 + len(payload), 0)
    total = 20 + len(udp) + len(payload)
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, total, 0, 0, 9, 17, 0, bytes([10, 0, 0, 1]), bytes([239, 1, 1, 1]))
    words = sum(struct.unpack(">10H", ip))
    words = (words & 0xFFFF) + (words >> 16)
    ip = ip[:10] + struct.pack(">H", ~(words + (words >> 16)) & 0xFFFF) + ip[12:]
    return bytes.fromhex("01005e010101020000000001 0800") + ip + udp + payload


class Reader:
    """What a worker does with its ring, without sending; the next one has the same ring, queue and copy arena."""

    def __init__(self, ring: Any, queue: socket.socket, copies: Any, sent: int) -> None:
        log = np.zeros(LOG_BYTES, np.uint8)
        sqes, cqes = np.zeros(SQ_ENTRIES, layout.IO_URING_SQE), np.zeros(2 * SQ_ENTRIES, layout.IO_URING_CQE)
        stats = np.zeros(layout.STATS_BYTES, np.uint8)
        self._memory = Memory(sqes, cqes, stats, copies, (log, log, log, log))
        self.ring = self._memory["rings"][0]
        self.ring["fd"], self.ring["base"], self.ring["frames"] = queue.fileno(), address_of(ring), len(ring)
        self.ring["frame_bytes"], self.ring["active"] = SLOT_BYTES, 1
        self.ring["cursor"] = find_cursor(address_of(ring), len(ring), SLOT_BYTES, sent)
        self.sent = int(self.ring["cursor"])
        self._memory.link_copies(0)
        resume_copies(self._memory.worker, 0)

    def read(self) -> bytes:
        """Parse the next frame, as loop.take_frames does; return its payload, b"" for one that is dropped."""
        frames = int(self.ring["frames"])
        at = (int(self.ring["cursor"]) + int(self.ring["taken"])) % frames
        slot = int(self.ring["base"]) + at * SLOT_BYTES
        if needs_fetch(self.ring, slot):
            self.sent = at  # what was read before is sent before the arena is filled again
            fetch_copies(self._memory.worker, 0)
        cause = read_frame(self._memory.worker, self.ring, 0, slot)
        self.ring["taken"] += 1
        datagram = self._memory.worker["datagram"]
        return b"" if cause else ctypes.string_at(int(datagram["payload"]), int(datagram["payload_bytes"]))

    def release(self) -> None:
        release(self._memory.worker, self.ring, 0)
        self.sent = int(self.ring["cursor"])


@settings(deadline=None)
@given(st.data())
def test_copies_that_a_dead_reader_had_fetched_are_sent_by_the_next(data: st.DataObject) -> None:
    """Readers one after the other, each of which dies with frames read and not sent: none is lost or read wrong."""
    kinds = data.draw(st.lists(st.booleans(), min_size=1, max_size=FRAMES_MAX // 2 - 1))
    ring = np.zeros((FRAMES_MAX, SLOT_BYTES), np.uint8)
    copies = np.zeros(COPIES_BYTES, np.uint8)
    first = data.draw(st.integers(0, FRAMES_MAX - 1))
    kernel, queue = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with kernel, queue:
        frames = [udp_frame(i // 2, 2000 if is_copy else 100) for i, is_copy in enumerate(kinds)]  # some are the same
        for i, (frame, is_copy) in enumerate(zip(frames, kinds, strict=True)):
            slot = ring[(first + i) % FRAMES_MAX]
            held = frame[:HEAD_BYTES] if is_copy else frame
            header = slot[: layout.TPACKET2_HDR.itemsize].view(layout.TPACKET2_HDR)[0]
            header["tp_len"], header["tp_snaplen"], header["tp_mac"] = len(frame), len(held), MAC
            slot[MAC : MAC + len(held)] = np.frombuffer(held, np.uint8)
            status = TP_STATUS_USER | TP_STATUS_CSUM_VALID | (TP_STATUS_COPY if is_copy else 0)
            header["tp_status"] = status
            if is_copy:
                kernel.send(bytes(VIRTIO_NET_HDR.itemsize) + frame)
        sent = 0  # frames
        for is_last in (False,) * data.draw(st.integers(0, 6)) + (True,):
            reader = Reader(ring, queue, copies, (first + sent) % FRAMES_MAX)
            assert (reader.sent - first) % FRAMES_MAX == sent
            left = len(frames) - sent
            for i in range(sent, sent + (left if is_last else data.draw(st.integers(0, left)))):
                assert reader.read() == frames[i][42:], f"frame {i} of {kinds}"
            if is_last or data.draw(st.booleans()):
                reader.release()
            sent = (reader.sent - first) % FRAMES_MAX
        assert sent == len(frames)
        assert not ring[:, 0].any()


@given(st.binary(min_size=64, max_size=64), st.integers(0, FRAMES_MAX - 1))
def test_an_arena_of_any_bytes_is_no_frame(noise: bytes, cursor: int) -> None:
    """A worker that was taken over by somebody may have left anything."""
    copies = np.resize(np.frombuffer(noise, np.uint8), COPIES_BYTES).copy()
    ring = np.zeros((FRAMES_MAX, SLOT_BYTES), np.uint8)
    frame = udp_frame(1, 2000)
    header = ring[cursor, : layout.TPACKET2_HDR.itemsize].view(layout.TPACKET2_HDR)[0]
    header["tp_len"], header["tp_snaplen"], header["tp_mac"] = len(frame), HEAD_BYTES, MAC
    header["tp_status"] = TP_STATUS_USER | TP_STATUS_COPY
    ring[cursor, MAC : MAC + HEAD_BYTES] = np.frombuffer(frame[:HEAD_BYTES], np.uint8)
    kernel, queue = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with kernel, queue:
        queue.setblocking(False)
        assert Reader(ring, queue, copies, cursor).read() == b""
