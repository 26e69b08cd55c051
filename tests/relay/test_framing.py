"""Frames over a stream: cut anywhere they come out whole; what is no frame is refused."""

import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.framing import FRAME_BYTES_MAX, FrameBuffer, encode
from relay.messages import ApplyRules, GetStats, Ready, ToSupervisor
from relay.rules import Output, Rule

RULE = Rule(rule_id="r", input_group="239.1.1.1", input_port=1, outputs=(Output("239.2.2.2", 1, "lo", "decrement"),))
MESSAGES = [Ready(), GetStats(7), ApplyRules(8, (RULE,), ("x",), ("r",))]


@given(st.lists(st.integers(1, 50), min_size=1))
def test_messages_survive_any_cutting(cuts: list[int]) -> None:
    stream = b"".join(encode(message) for message in MESSAGES)
    buffer = FrameBuffer(ToSupervisor)
    received = []
    at = turn = 0
    while at < len(stream):
        size = cuts[turn % len(cuts)]
        received += buffer.feed(stream[at : at + size])
        at, turn = at + size, turn + 1
    assert received == MESSAGES


@pytest.mark.parametrize("raw", [struct.pack("<I", FRAME_BYTES_MAX + 1), struct.pack("<I", 1) + b"\xc1"])
def test_what_is_no_frame_is_refused(raw: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        FrameBuffer(ToSupervisor).feed(raw)


@given(st.binary(max_size=64))
def test_no_bytes_do_worse_than_be_refused(raw: bytes) -> None:
    try:
        FrameBuffer(ToSupervisor).feed(raw)
    except msgspec.MsgspecError as error:
        assert str(error)
