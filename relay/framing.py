"""Messages over a byte stream: a little-endian u32 length, then msgpack. Pure: bytes in, messages out.

Used between supervisor and control plane, whose messages (ten thousand rules) outgrow a packet socket.
"""

import struct
from typing import Any

import msgspec

LENGTH = struct.Struct("<I")
FRAME_BYTES_MAX = 64 << 20  # ten times the statistics of RULES_MAX rules

_encoder = msgspec.msgpack.Encoder()


def encode(message: msgspec.Struct) -> bytes:
    """The frame of a message."""
    payload = _encoder.encode(message)
    assert len(payload) <= FRAME_BYTES_MAX
    return LENGTH.pack(len(payload)) + payload


def decode(decoder: "msgspec.msgpack.Decoder[Any] | msgspec.json.Decoder[Any]", payload: bytes | bytearray) -> Any:
    """As the decoder does, with msgspec.DecodeError for all that is no such message: it raises two others besides."""
    try:
        return decoder.decode(payload)
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(str(error)) from error


class FrameBuffer:
    """Collects received bytes; `feed` returns the messages they complete. `incoming` is their union type.

    Memory grows with what was received, never with what a length announces.
    """

    def __init__(self, incoming: Any, frame_bytes_max: int = FRAME_BYTES_MAX) -> None:
        self._frame_bytes_max = frame_bytes_max
        self._decoder = msgspec.msgpack.Decoder(incoming)
        self._pending = bytearray()

    def feed(self, received: bytes) -> list[Any]:
        """Raises msgspec.ValidationError or msgspec.DecodeError for bytes that are no such message."""
        self._pending += received
        messages = []
        while len(self._pending) >= LENGTH.size:
            (length,) = LENGTH.unpack_from(self._pending)
            if length > self._frame_bytes_max:
                raise msgspec.DecodeError(f"a message of {length} bytes is over the limit of {self._frame_bytes_max}")
            end = LENGTH.size + length
            if len(self._pending) < end:
                break
            messages.append(decode(self._decoder, self._pending[LENGTH.size : end]))
            del self._pending[:end]
        return messages
