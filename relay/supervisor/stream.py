"""The supervisor's end of the stream to the control plane: never blocks, keeps what can't be sent yet."""

import socket
from typing import Any

import msgspec

from relay import framing
from relay.messages import ToSupervisor
from relay.supervisor.children import MisbehaviourError

RECEIVE_BYTES = 256 << 10
REQUEST_BYTES_MAX = 16 << 20  # twice as much as OUTPUTS_MAX outputs of RULES_MAX rules take
UNSENT_BYTES_MAX = 128 << 20  # twice the longest message
UNSENT_BYTES_HIGH = 1 << 20  # with more than this unsent, no further request is worth obeying


class StreamBrokenError(Exception):
    """The other side is gone."""


class ControlPlaneStream:
    """Framed messages over a non-blocking socket."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._buffer = framing.FrameBuffer(ToSupervisor, REQUEST_BYTES_MAX)
        self._unsent = bytearray()

    def fileno(self) -> int:
        """The descriptor to poll."""
        return self._socket.fileno()

    @property
    def wants_to_write(self) -> bool:
        """Whether to poll for room."""
        return bool(self._unsent)

    @property
    def is_congested(self) -> bool:
        """Whether the other side takes its answers more slowly than it asks."""
        return len(self._unsent) > UNSENT_BYTES_HIGH

    def send(self, message: msgspec.Struct) -> None:
        """Send, or keep until there is room. Raises StreamBrokenError, MisbehaviourError."""
        frame = framing.encode(message)
        if len(self._unsent) + len(frame) > UNSENT_BYTES_MAX:
            raise MisbehaviourError(f"nothing is taken from its stream, where {len(self._unsent)} bytes wait")
        self._unsent += frame
        self.flush()

    def flush(self) -> None:
        """Send what was kept. Raises StreamBrokenError."""
        try:
            while self._unsent:
                del self._unsent[: self._socket.send(self._unsent)]
        except BlockingIOError:
            return
        except OSError as error:
            raise StreamBrokenError(str(error)) from error

    def receive(self) -> list[Any]:
        """The messages that have arrived. Raises StreamBrokenError, MisbehaviourError."""
        try:
            received = self._socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return []
        except OSError as error:
            raise StreamBrokenError(str(error)) from error
        if not received:
            raise StreamBrokenError("it closed its stream")
        try:
            return self._buffer.feed(received)
        except msgspec.MsgspecError as error:
            raise MisbehaviourError(f"no valid message: {error}") from error

    def close(self) -> None:
        """Close our end."""
        self._socket.close()
