"""Where a new worker goes on in a ring whose reader died, whatever that one was doing."""

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from relay.dataplane.layout import TP_STATUS_KERNEL, TP_STATUS_USER
from relay.dataplane.memory import address_of
from relay.dataplane.ring import find_cursor

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
