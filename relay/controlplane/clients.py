"""The clients' connections: lines in, answers out, and limits on everything that a client can make us keep.

    listener ─▶ a place? ─▶ a line, whole in time ─▶ answer ─▶ taken in time ─┐
                   │  no                 ▲                                    │
                   ▼                     └────────────────────────────────────┘
                an error

Each connection is a task of its own, which gives way after every answer: who floods or stalls delays itself.
"""

import asyncio
import contextlib
import errno
import socket
import time
from collections.abc import Awaitable, Callable

import msgspec

from logging_shm import Logger
from relay.api import LOOK_BYTES_MAX, REQUEST_BYTES_MAX, Answer
from relay.controlplane.authorise import Access, Peer
from relay.controlplane.places import OF_A_USER_MAX, OF_STRANGERS_MAX, must_give_way

REQUEST_S_MAX = 5.0  # from a request's first byte to its last
ANSWER_S_MAX = 5.0  # for a client to take an answer
IDLE_S_MAX = 600.0
CHUNK_BYTES = 64 << 10
LARGE_REQUESTS_MAX = 4  # longer than a chunk, from collecting to answer; the next ones wait in their senders
ACCEPTED_AT_ONCE = 64  # in one pass of the loop: clients that flood the listener must not keep others waiting in it
ACCEPT_PAUSE_S = 0.1  # without descriptors or memory for another connection

_encoder = msgspec.json.Encoder()
Reply = Callable[[bytes, Peer], Awaitable[bytes]]


def encode(answer: Answer) -> bytes:
    """An answer as it is sent."""
    return _encoder.encode(answer) + b"\n"


class LimitError(Exception):
    """The client went over a limit, which its text names; the connection ends."""


class Connection:
    """One client's place, and its stream once that is open."""

    def __init__(self, peer: Peer, large: asyncio.Semaphore) -> None:
        self.peer = peer
        self.idle_since_s: float | None = time.monotonic()
        self.task: asyncio.Task[None] | None = None
        self._large = large
        self._holds_large = False
        self._buffer = bytearray()
        self._request_bytes_max = REQUEST_BYTES_MAX if peer.may_change else LOOK_BYTES_MAX

    async def open(self, client: socket.socket) -> None:
        """Take the stream over."""
        loop = asyncio.get_running_loop()
        self._reader = asyncio.StreamReader(limit=CHUNK_BYTES)
        protocol = asyncio.StreamReaderProtocol(self._reader)
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, client)
        transport.set_write_buffer_limits(0)  # drain() waits until everything is sent
        self._writer = asyncio.StreamWriter(transport, protocol, self._reader, loop)

    async def read(self) -> bytes | None:
        """The next request, None at the end or after IDLE_S_MAX. Raises LimitError for one too long or too slow."""
        if not self._buffer:
            self.idle_since_s = time.monotonic()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(IDLE_S_MAX):
                    await self._receive()
            if not self._buffer:
                return None
        self.idle_since_s = None
        try:
            async with asyncio.timeout(REQUEST_S_MAX) as deadline:
                return await self._rest(deadline)
        except TimeoutError:
            raise LimitError(f"a request was not complete within {REQUEST_S_MAX:.0f} s") from None

    async def _rest(self, deadline: asyncio.Timeout) -> bytes:
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched > self._request_bytes_max:
                break
            if searched > CHUNK_BYTES:
                await self._hold_large(deadline)
            if not await self._receive():
                end = searched  # what stands before the end is a request, too
                break
        if not 0 <= end <= self._request_bytes_max:
            raise LimitError(f"request is over {self._request_bytes_max} bytes")
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    async def _hold_large(self, deadline: asyncio.Timeout) -> None:
        """Wait for one of the few that may be large; that is no time of the client's."""
        if not self._holds_large:
            deadline.reschedule(None)
            await self._large.acquire()
            self._holds_large = True
            deadline.reschedule(asyncio.get_running_loop().time() + REQUEST_S_MAX)

    def release(self) -> None:
        """The request is dealt with."""
        if self._holds_large:
            self._large.release()
            self._holds_large = False

    async def _receive(self) -> bool:
        received = await self._reader.read(CHUNK_BYTES)
        self._buffer += received
        return bool(received)

    async def write(self, answer: bytes) -> None:
        """Send an answer, of which no more than a chunk is copied. Raises LimitError, ConnectionError."""
        try:
            async with asyncio.timeout(ANSWER_S_MAX):
                for at in range(0, len(answer), CHUNK_BYTES):
                    self._writer.write(answer[at : at + CHUNK_BYTES])
                    await self._writer.drain()
        except TimeoutError:
            self._writer.transport.abort()
            raise LimitError(f"an answer was not taken within {ANSWER_S_MAX:.0f} s") from None

    def close(self) -> None:
        """End the connection."""
        self.release()
        if hasattr(self, "_writer"):
            self._writer.close()


class Clients:
    """All connections; `reply` makes the answer to a line. Raises nothing that a client could cause."""

    def __init__(self, log: Logger, listener: socket.socket, access: Access, reply: Reply) -> None:
        self._log = log
        self._listener = listener
        self._access = access
        self._reply = reply
        self._connections: set[Connection] = set()
        self._large = asyncio.Semaphore(LARGE_REQUESTS_MAX)

    def start(self) -> None:
        """Take in clients from now on."""
        self._listener.setblocking(False)
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def stop(self) -> None:
        """Take in nobody any more, and let go of those that are here."""
        asyncio.get_running_loop().remove_reader(self._listener)
        for connection in self._connections:
            self._cancel(connection)

    def _accept(self) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                client, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    raise
                self._log.error(f"No client can connect: {error.strerror}")
                loop = asyncio.get_running_loop()
                loop.remove_reader(self._listener)
                loop.call_later(ACCEPT_PAUSE_S, self.start)
                return
            self._admit(client)

    def _admit(self, client: socket.socket) -> None:
        """Give a client a place, or tell it that there is none."""
        client.setblocking(False)
        peer = self._access.peer(client)
        is_full, leaver = must_give_way(self._connections, peer)
        if leaver is not None:
            self._connections.discard(leaver)
            self._cancel(leaver)
        elif is_full:
            self._refuse(client, peer)
            return
        connection = Connection(peer, self._large)
        self._connections.add(connection)
        connection.task = asyncio.create_task(self._serve(connection, client))

    @staticmethod
    def _cancel(connection: Connection) -> None:
        if connection.task is not None:
            connection.task.cancel()

    def _refuse(self, client: socket.socket, peer: Peer) -> None:
        limit = f"{OF_A_USER_MAX} of a user" + ("" if peer.may_change else f", {OF_STRANGERS_MAX} of all who only look")
        error = f"too many connections: user id {peer.uid} may open another when one ends ({limit})"
        with contextlib.suppress(OSError), client:
            client.send(encode(Answer(ok=False, error=error)))
        self._log.warning("Connection refused: too many", uid=peer.uid)

    async def _serve(self, connection: Connection, client: socket.socket) -> None:
        """Answer one client's requests, one line each, until it closes."""
        try:
            await connection.open(client)
            while (line := await connection.read()) is not None:
                await connection.write(await self._reply(line, connection.peer))
                connection.release()
                await asyncio.sleep(0)  # what waits in this connection's buffer is no reason to let others wait
        except LimitError as error:
            self._log.warning(f"Connection closed: {error}", uid=connection.peer.uid)
            with contextlib.suppress(LimitError, OSError):
                await connection.write(encode(Answer(ok=False, error=f"{error}: the connection ends")))
        except OSError:
            return  # the client is gone
        finally:
            self._connections.discard(connection)
            connection.close()
            client.close()
