"""Typed messages with file descriptors over a SOCK_SEQPACKET socket pair: supervisor ↔ template, workers.

One message a packet, msgpack, its descriptors as SCM_RIGHTS. What the receiver does not expect is an error
that closes the descriptors that came along.
"""

import array
import errno
import os
import socket
from typing import Any, Generic, TypeVar

import msgspec

from relay.framing import decode

PACKET_BYTES_MAX = 65_536
DESCRIPTORS_MAX = 200  # a message; the kernel's limit is SCM_MAX_FD, 253
SEND_BUFFER_BYTES = 1 << 20  # the sockets of 32 768 outputs, one message each 200, with the kernel's own share
SO_SNDBUFFORCE = 32
# As with EAGAIN, a later try may succeed. ETOOMANYREFS: too many descriptors are under way, see unix(7).
TRY_LATER = (errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS)

Incoming = TypeVar("Incoming")


class ChannelClosedError(Exception):
    """The other side is gone."""


class Channel(Generic[Incoming]):
    """One end of a socket pair. `incoming` is the union of message types that may arrive here.

    With `descriptors_max` 0 the kernel never installs a descriptor that the other side sends; it is an error.
    """

    def __init__(self, end: socket.socket, incoming: Any, descriptors_max: int = DESCRIPTORS_MAX) -> None:
        self._socket = end
        self._control_bytes = socket.CMSG_SPACE(descriptors_max * array.array("i").itemsize) if descriptors_max else 0
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(incoming)

    def fileno(self) -> int:
        """The descriptor to poll."""
        return self._socket.fileno()

    def send(self, message: msgspec.Struct, descriptors: list[int] | None = None) -> None:
        """Send one message.

        Raises ChannelClosedError when nobody is left to read it; BlockingIOError when it has to be sent later, as there
        is no room now.
        """
        payload = self._encoder.encode(message)
        assert len(payload) <= PACKET_BYTES_MAX
        try:
            if descriptors:
                assert len(descriptors) <= DESCRIPTORS_MAX
                socket.send_fds(self._socket, [payload], descriptors)
            else:
                self._socket.send(payload)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ChannelClosedError from error
        except OSError as error:
            if error.errno in TRY_LATER:
                raise BlockingIOError(error.errno, error.strerror) from error
            raise

    def receive(self) -> tuple[Incoming, list[int]]:
        """Receive one message and its descriptors, which the caller then owns.

        Raises ChannelClosedError at the end of the stream, BlockingIOError when none waits on a
        non-blocking socket, and msgspec.ValidationError for a message of another shape.
        """
        descriptors = array.array("i")
        try:
            try:
                payload, control, flags, _ = self._receive()
            except ConnectionResetError:  # it left with messages unread, which is told once; what it sent is still here
                payload, control, flags, _ = self._receive()
        except ConnectionResetError as error:
            raise ChannelClosedError from error
        for level, kind, data in control:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
        owned = list(descriptors)
        if not payload:
            raise ChannelClosedError
        try:
            if flags & socket.MSG_TRUNC:
                raise msgspec.ValidationError(f"a message over the limit of {PACKET_BYTES_MAX} bytes")
            if flags & socket.MSG_CTRUNC:
                raise msgspec.ValidationError("descriptors that nobody asked for")
            message: Incoming = decode(self._decoder, payload)
            return message, owned
        except msgspec.MsgspecError:
            for descriptor in owned:
                os.close(descriptor)
            raise

    def _receive(self) -> tuple[bytes, list[tuple[int, int, bytes]], int, Any]:
        # Python's own are closed when another program is executed, those that arrive only with this flag.
        return self._socket.recvmsg(PACKET_BYTES_MAX, self._control_bytes, socket.MSG_CMSG_CLOEXEC)

    def close(self) -> None:
        """Close this end; the other side sees the end of the stream."""
        self._socket.close()


def channel_pair(ours: Any, non_blocking: bool = True) -> tuple[Channel[Incoming], socket.socket]:
    """A channel that receives `ours`, and no descriptor, and the raw other end to hand over."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    near.setblocking(not non_blocking)
    try:
        near.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, SEND_BUFFER_BYTES)
    except PermissionError:
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)  # as much as net.core.wmem_max allows
    return Channel(near, ours, descriptors_max=0), far
