"""The control plane: serves clients, validates what they ask, keeps the rule set, asks the supervisor to act.

One unprivileged process with one asyncio loop, which opens nothing any more once it serves (relay/confinement). It
owns the rule set; the supervisor keeps a copy that outlives this process and checks every rule again. Changes are
made one after the other, each all or nothing.
"""

import asyncio
import itertools
import os
import socket
from collections.abc import Callable
from typing import Any

import msgspec

from logging_shm import Logger
from relay import api, framing, messages
from relay.config import validate_unnamed
from relay.confinement.roles import confine_control_plane
from relay.controlplane.authorise import authorise, peer_uid
from relay.controlplane.interfaces import Interfaces
from relay.errors import ControlError, RelayError
from relay.rules import Rule, chain_warnings, check_cycles, merge, named
from relay.version import VERSION

RECEIVE_BYTES = 1 << 20


class ControlPlane:
    """The rule set, the clients, and the stream to the supervisor."""

    def __init__(self, log: Logger, supervisor: socket.socket, listener: socket.socket) -> None:
        self._log = log
        self._supervisor_socket = supervisor
        self._listener = listener
        self._rules: dict[str, Rule] = {}
        self._configured: set[str] = set()
        self._interfaces: tuple[str, ...] = ()
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._changing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._kernel = Interfaces()
        self._decoder = msgspec.json.Decoder(api.Request)
        self._encoder = msgspec.json.Encoder()

    async def run(self) -> None:
        """Serve until the supervisor's stream ends."""
        reader, self._supervisor = await asyncio.open_connection(sock=self._supervisor_socket)
        server = await asyncio.start_unix_server(self._serve, sock=self._listener, limit=api.REQUEST_BYTES_MAX)
        if not confine_control_plane():
            self._log.warning("No seccomp filter: this kernel or machine has none for it")
        self._log.info("Control plane worker started")
        self._send(messages.Ready())
        buffer = framing.FrameBuffer(messages.ToControlPlane)
        while received := await reader.read(RECEIVE_BYTES):
            for message in buffer.feed(received):
                self._on_message(message)
        self._log.info("Supervisor stream closed")
        server.close()

    # --- supervisor -------------------------------------------------------------------------------

    def _send(self, message: msgspec.Struct) -> None:
        self._supervisor.write(framing.encode(message))

    def _on_message(self, message: Any) -> None:
        match message:
            case messages.Restore():
                self._rules = {rule.rule_id: rule for rule in message.rules}
                self._configured = set(message.configured)
                self._interfaces = message.interfaces
            case messages.Configure():
                task = asyncio.create_task(self._configure(message.rules))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            case _:
                answer = self._answers.pop(message.request_id, None)
                if answer is not None and not answer.done():
                    answer.set_result(message)

    async def _ask(self, make: Callable[[int], msgspec.Struct]) -> Any:
        """Send a request made with a new number, return its answer. Raises ControlError when refused."""
        number = next(self._numbers)
        answer = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        self._send(make(number))
        message = await answer
        if isinstance(message, messages.Refused):
            raise ControlError(message.error)
        return message

    async def _configure(self, rules: tuple[Rule, ...]) -> None:
        """Install exactly these as the configuration's rules; rules that clients added stay."""
        try:
            async with self._changing:
                add, replaced = merge(self._rules, rules, replace=True)
                wanted = {rule.rule_id for rule in rules}
                gone = tuple(sorted(self._configured - wanted))
                if add or replaced or gone or self._configured != wanted:
                    await self._change(add, (*replaced, *gone), tuple(sorted(wanted)))
        except RelayError as error:
            self._log.error(f"Configuration refused: {error}")

    async def _change(
        self, add: tuple[Rule, ...], remove: tuple[str, ...], configured: tuple[str, ...] | None = None
    ) -> list[str]:
        """Let the supervisor change rules; return warnings. Raises RelayError, and nothing is changed then."""
        after = {rule_id: rule for rule_id, rule in self._rules.items() if rule_id not in remove}
        after |= {rule.rule_id: rule for rule in add}
        check_cycles(add, after, self._interfaces)
        done = await self._ask(lambda number: messages.ApplyRules(number, add, remove, configured))
        self._rules = after
        self._configured = set(configured) if configured is not None else self._configured & set(after)
        return [*done.warnings, *chain_warnings(add, after, self._interfaces)]

    # --- clients ----------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one client's requests, one line each, until it closes."""
        uid = peer_uid(writer.get_extra_info("socket"))
        try:
            while line := await reader.readline():
                writer.write(self._encoder.encode(await self._answer(line, uid)) + b"\n")
                await writer.drain()
        except ValueError:
            answer = api.Answer(ok=False, error=f"request is over {api.REQUEST_BYTES_MAX} bytes")
            writer.write(self._encoder.encode(answer) + b"\n")
        except (ConnectionError, asyncio.CancelledError):  # cancelled: this process ends
            return
        finally:
            writer.close()

    async def _answer(self, line: bytes, uid: int) -> api.Answer:
        """The answer to one line. Whatever is wrong with it is told to its client alone."""
        try:
            request = self._decoder.decode(line)
        except msgspec.MsgspecError as error:
            self._log.warning("Request refused: not valid", uid=uid)
            return api.Answer(ok=False, error=f"not a valid request: {error}")
        kind = type(request).__struct_config__.tag
        self._log.info(f"Received command {kind}", uid=uid)
        try:
            authorise(request, uid, (0, os.getuid()))
            return await self._obey(request)
        except RelayError as error:
            self._log.warning(f"Command {kind} refused: {error}", uid=uid)
            return api.Answer(ok=False, error=str(error))

    async def _obey(self, request: api.Request) -> api.Answer:  # noqa: PLR0911 - one return a request
        match request:
            case api.AddRules():
                return await self._add(request)
            case api.RemoveRules():
                return await self._remove(request)
            case api.ListRules():
                return api.Answer(ok=True, result=await self._list_rules())
            case api.GetStats():
                return api.Answer(ok=True, result=await self._ask(messages.GetStats))
            case api.ListWorkers():
                return api.Answer(ok=True, result=(await self._ask(messages.ListWorkers)).workers)
            case api.LogLevel():
                levels = await self._ask(
                    lambda number: messages.LogLevel(number, request.level, request.facility, request.core)
                )
                return api.Answer(ok=True, result=levels.levels)
            case api.Restart():
                await self._ask(messages.Restart)
                return api.Answer(ok=True)
            case api.Ping():
                return api.Answer(ok=True, result={"version": VERSION})

    async def _add(self, request: api.AddRules) -> api.Answer:
        wanted = [named(validate_unnamed(rule)) for rule in request.rules]
        warnings: list[str] = []
        async with self._changing:
            add, replaced = merge(self._rules, wanted, request.replace)
            if add:
                self._check_interfaces(add)
                warnings = await self._change(add, replaced)
        ids = [rule.rule_id for rule in wanted]
        unchanged = [rule_id for rule_id in ids if rule_id not in {rule.rule_id for rule in add}]
        return api.Answer(ok=True, result={"rule_ids": ids, "unchanged": unchanged}, warnings=tuple(warnings))

    async def _remove(self, request: api.RemoveRules) -> api.Answer:
        async with self._changing:
            for rule_id in request.rule_ids:
                if rule_id not in self._rules:
                    raise ControlError(f"no rule {rule_id}: `mcrctl list-rules` shows those there are")
            warnings = await self._change((), request.rule_ids)
        return api.Answer(ok=True, result={"rule_ids": request.rule_ids}, warnings=tuple(warnings))

    async def _list_rules(self) -> list[dict[str, Any]]:
        stats = await self._ask(messages.GetStats)
        states = {rule.rule_id: rule.state for rule in stats.rules}
        return [
            {**msgspec.to_builtins(rule), "state": states.get(rule_id, "waiting: not installed yet")}
            for rule_id, rule in self._rules.items()
        ]

    def _check_interfaces(self, rules: tuple[Rule, ...]) -> None:
        """Raises ControlError for a name that is no interface now: more likely misspelt than on its way."""
        existing = self._kernel.names()
        for rule in rules:
            names = [output.interface for output in rule.outputs]
            names += [rule.input_interface] if rule.input_interface else []
            for name in names:
                if name not in existing:
                    raise ControlError(
                        f"rule {rule.rule_id}: no interface {name}: this host has {', '.join(sorted(existing))}"
                    )
