"""The client of client.py for programs that use asyncio: the same commands, each a coroutine.

async with AsyncClient() as client:
    stats = await client.stats()
"""

import asyncio
import contextlib
import socket
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from relay import calls
from relay.api import ActiveRule, Added, Answer, ListWorkers, Pong, Removed, Request, Restart
from relay.calls import RETRY_S, TIMEOUT_S, BrokenError, Call, Result
from relay.config import socket_path
from relay.errors import UnreachableError
from relay.messages import Stats, WorkerStats
from relay.rules import Rule


class AsyncClient:
    """A connection to the relay behind a control socket; an async context manager. For one event loop.

    Tasks may share it: their requests go one after the other, and each one's `timeout_s` begins with its turn. A
    request that is cancelled closes the connection; the next one opens another. Errors are those of Client.
    """

    def __init__(
        self, path: Path | str | None = None, timeout_s: float = TIMEOUT_S, *, instance: str | None = None
    ) -> None:
        """For the control socket at `path`, or that of `instance`. The first request connects."""
        self._path = Path(path) if path is not None else socket_path(None, instance)
        self._timeout_s = timeout_s
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._turn = asyncio.Lock()

    async def _connect(self, deadline_s: float) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            # With a full queue a connect that may not block fails, and there is nothing to wait for. man 2 connect.
            while (error := _begin_connect(sock, self._path)) is not None:
                if not isinstance(error, BlockingIOError) or asyncio.get_running_loop().time() > deadline_s:
                    raise calls.unreachable(self._path, error) from error
                await asyncio.sleep(RETRY_S)
            self._streams = await asyncio.open_unix_connection(sock=sock)
        except BaseException:
            sock.close()
            raise
        return self._streams

    async def ask(self, request: Request) -> Answer:
        """As Client.ask."""
        request = calls.repeatable(request)
        line = calls.encode(request)
        async with self._turn:
            deadline_s = asyncio.get_running_loop().time() + self._timeout_s
            while True:
                try:
                    received = await self._exchange(line, deadline_s)
                    break
                except BrokenError as error:
                    over = asyncio.get_running_loop().time() + RETRY_S > deadline_s
                    if not isinstance(request, calls.REPEATED) or over:
                        raise calls.lost(self._path, request, str(error)) from error
                    await asyncio.sleep(RETRY_S)
        return calls.decode(received)

    async def _exchange(self, line: bytes, deadline_s: float) -> bytes:
        """As Client._exchange."""
        reader, writer = self._streams or await self._connect(deadline_s)
        answer = calls.Line()
        try:
            async with asyncio.timeout_at(deadline_s):
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    writer.write(line)
                    await writer.drain()
                while True:
                    received = answer.feed(await reader.read(calls.RECEIVE_BYTES))
                    if received is not None:
                        return received
        except BaseException as error:
            self._drop()
            if isinstance(error, TimeoutError):
                raise calls.too_slow(self._path, self._timeout_s) from error
            if isinstance(error, OSError):
                raise BrokenError(str(error)) from error
            raise

    async def _call(self, call: Call[Result]) -> Result:
        return call.read(await self.ask(call.request))

    # --- commands ---------------------------------------------------------------------------------

    async def ping(self) -> Pong:
        """As Client.ping."""
        return await self._call(calls.ping())

    async def stats(self) -> Stats:
        """As Client.stats."""
        return await self._call(calls.stats())

    async def rules(self) -> list[ActiveRule]:
        """As Client.rules."""
        return await self._call(calls.rules())

    async def workers(self) -> list[WorkerStats]:
        """As Client.workers."""
        return await self._call(calls.workers())

    async def add_rule(self, rule: Rule, *, replace: bool = False) -> Added:
        """As Client.add_rule."""
        return await self.add_rules((rule,), replace=replace)

    async def add_rules(self, rules: Iterable[Rule], *, replace: bool = False) -> Added:
        """As Client.add_rules."""
        return await self._call(calls.add_rules(rules, replace))

    async def remove_rule(self, rule_id: str) -> Removed:
        """As Client.remove_rule."""
        return await self.remove_rules((rule_id,))

    async def remove_rules(self, rule_ids: Iterable[str]) -> Removed:
        """As Client.remove_rules."""
        return await self._call(calls.remove_rules(rule_ids))

    async def log_levels(self, *, facility: str | None = None, core: int | None = None) -> dict[str, str]:
        """As Client.log_levels."""
        return await self._call(calls.log_level(None, facility, core))

    async def set_log_level(
        self, level: str, *, facility: str | None = None, core: int | None = None
    ) -> dict[str, str]:
        """As Client.set_log_level."""
        return await self._call(calls.log_level(level, facility, core))

    async def restart(self, timeout_s: float = calls.RESTART_S_MAX) -> int:
        """As Client.restart."""
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        former = calls.pids((await self.ask(ListWorkers())).result)
        with contextlib.suppress(UnreachableError):  # it may be gone before it has answered
            await self.ask(Restart())
        while not await self._are_replaced(former):
            if asyncio.get_running_loop().time() > deadline_s:
                raise calls.not_replaced(self._path, timeout_s)
            await asyncio.sleep(calls.RESTART_POLL_S)
        return len(former)

    async def _are_replaced(self, former: frozenset[int]) -> bool:
        try:
            return calls.are_replaced((await self.ask(ListWorkers())).result, former)
        except UnreachableError:
            return False

    # --- life -------------------------------------------------------------------------------------

    def _drop(self) -> None:
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None

    async def close(self) -> None:
        """Close the connection. The next request opens another one."""
        if self._streams is not None:
            writer, self._streams = self._streams[1], None
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def __aenter__(self) -> Self:
        async with self._turn:
            if self._streams is None:
                await self._connect(asyncio.get_running_loop().time() + self._timeout_s)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _begin_connect(sock: socket.socket, path: Path) -> OSError | None:
    try:
        sock.connect(str(path))
    except OSError as error:
        return error
    return None
