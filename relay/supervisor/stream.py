"""The supervisor's end of the stream to the control plane: never blocks, keeps what can't be sent yet."""

import socket
from typing import Any

import msgspec

from relay import framing
from relay.messages import ToSupervisor

RECEIVE_BYTES = 1 << 20
UNSENT_BYTES_MAX = 256 << 20  # a control plane that takes no answers is broken


class StreamBrokenError(Exception):
    """The other side is gone, sent what is no message, or takes nothing."""


class ControlPlaneStream:
    """Framed messages over a non-blocking socket."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._buffer = framing.FrameBuffer(ToSupervisor)
        self._unsent = bytearray()

    def fileno(self) -> int:
        """The descriptor to poll."""
        return self._socket.fileno()

    @property
    def wants_to_write(self) -> bool:
        """Whether to poll for room."""
        return bool(self._unsent)

    def send(self, message: msgspec.Struct) -> None:
        """Send, or keep until there is room. Raises StreamBrokenError."""
        self._unsent += framing.encode(message)
        if len(self._unsent) > UNSENT_BYTES_MAX:
            raise StreamBrokenError("it takes no answers")
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
        """The messages that have arrived. Raises StreamBrokenError."""
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
            raise StreamBrokenError(f"it sent no valid message: {error}") from error

    def close(self) -> None:
        """Close our end."""
        self._socket.close()
