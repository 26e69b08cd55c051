"""Frames over a stream: cut anywhere they come out whole; what is no frame is refused."""

import os
import random
import struct
import tracemalloc

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


@pytest.mark.parametrize(
    "raw",
    [
        struct.pack("<I", FRAME_BYTES_MAX + 1),
        struct.pack("<I", 1) + b"\xc1",
        struct.pack("<I", 7) + b"\x81\xa4ty\x86e\xc0",  # not UTF-8, for which msgspec raises an error of Python's
    ],
)
def test_what_is_no_frame_is_refused(raw: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        FrameBuffer(ToSupervisor).feed(raw)


@given(st.binary(max_size=64))
def test_no_bytes_do_worse_than_be_refused(raw: bytes) -> None:
    try:
        FrameBuffer(ToSupervisor).feed(raw)
    except msgspec.MsgspecError as error:
        assert str(error)


def test_a_receiver_may_allow_less() -> None:
    frame = encode(ApplyRules(8, (RULE,)))
    with pytest.raises(msgspec.DecodeError, match="over the limit of 10"):
        FrameBuffer(ToSupervisor, 10).feed(frame)


def test_a_length_alone_takes_no_memory() -> None:
    tracemalloc.start()
    try:
        FrameBuffer(ToSupervisor).feed(struct.pack("<I", FRAME_BYTES_MAX))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def mutated(frame: bytes, dice: random.Random) -> bytes:
    """A frame with some bytes changed, cut out or put in; its length tells the truth or not."""
    payload = bytearray(frame[4:])
    for _ in range(dice.randrange(4)):
        at = dice.randrange(len(payload) + 1)
        payload[at : at + dice.randrange(3)] = dice.randbytes(dice.randrange(3))
    length = len(payload) if dice.random() < 0.9 else dice.randrange(1 << 32)
    return struct.pack("<I", length) + payload


def test_mutated_messages_are_decoded_or_refused_and_take_no_memory() -> None:
    count = int(os.environ.get("MCR_FUZZ_MESSAGES", "20000"))
    dice = random.Random(count)
    frames = [encode(message) for message in MESSAGES]
    kinds: set[str] = set()
    buffer = FrameBuffer(ToSupervisor, 1 << 16)

    def feed(times: int) -> None:
        nonlocal buffer
        for _ in range(times):
            stream = mutated(dice.choice(frames), dice) if dice.random() < 0.9 else dice.randbytes(dice.randrange(64))
            try:
                kinds.update(type(message).__name__ for message in buffer.feed(stream))
            except msgspec.MsgspecError as error:
                kinds.add(type(error).__name__)
                buffer = FrameBuffer(ToSupervisor, 1 << 16)  # as the supervisor ends such a stream

    feed(2000)
    tracemalloc.start()
    try:
        feed(1000)
        before = tracemalloc.get_traced_memory()[0]
        feed(count)
        assert tracemalloc.get_traced_memory()[0] - before < 1 << 18  # a frame that is not whole yet
    finally:
        tracemalloc.stop()
    assert kinds >= {"Ready", "GetStats", "ApplyRules", "ValidationError", "DecodeError"}
