"""The control plane: serves clients, validates what they ask, keeps the rule set, asks the supervisor to act.

One unprivileged process with one asyncio loop, which opens nothing any more once it serves (relay/confinement). It
owns the rule set; the supervisor keeps a copy that outlives this process and checks every rule again. Changes are
made one after the other, each all or nothing.
"""

import asyncio
import contextlib
import itertools
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec

from logging_shm import Logger
from relay import api, framing, messages
from relay.config import validate_unnamed
from relay.confinement.roles import confine_control_plane
from relay.controlplane.authorise import Access, Peer, authorise
from relay.controlplane.clients import CHUNK_BYTES, Clients, encode
from relay.controlplane.interfaces import Interfaces
from relay.controlplane.rounds import Rounds
from relay.errors import ControlError, RelayError
from relay.rules import (
    Rule,
    chain_warnings,
    check_cycles,
    check_protected,
    check_room,
    fingerprint,
    legs,
    merge,
    named,
)
from relay.version import VERSION

RECEIVE_BYTES = 1 << 20
CHANGES_MAX = 16  # under way and waiting for it; fewer than a user has connections
CARRIED_OUT_MAX = 4096  # ids of clients' changes that are remembered, as the supervisor does


class ControlPlane:
    """The rule set, the clients, and the stream to the supervisor."""

    def __init__(self, log: Logger, supervisor: socket.socket, listener: socket.socket, access: Access) -> None:
        self._log = log
        self._supervisor_socket = supervisor
        self._clients = Clients(log, listener, access, self._reply)
        self._rules: dict[str, Rule] = {}
        self._configured: set[str] = set()
        self._interfaces: tuple[str, ...] = ()
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._changing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._kernel = Interfaces()
        self._changes = 0
        self._carried_out: dict[str, None] = {}  # the oldest first
        self._large = asyncio.Lock()
        self._decoder = msgspec.json.Decoder(api.Request)
        # Answers that grow with the rules: one for all who wait.
        self._rounds = {
            api.ListRules: Rounds(self._list_rules),
            api.GetStats: Rounds(self._get_stats),
            api.ListWorkers: Rounds(self._list_workers),
            api.GetOptions: Rounds(self._get_options),
        }

    async def run(self) -> None:
        """Serve until the supervisor's stream ends: from its first message on, which tells what rules there are."""
        reader, self._supervisor = await asyncio.open_connection(sock=self._supervisor_socket)
        if not confine_control_plane():
            self._log.warning("No seccomp filter: this kernel or machine has none for it")
        buffer = framing.FrameBuffer(messages.ToControlPlane)
        with contextlib.suppress(ConnectionError):  # it ended with requests of ours unread
            while received := await reader.read(RECEIVE_BYTES):
                for message in buffer.feed(received):
                    self._on_message(message)
        self._log.info("Supervisor stream closed")
        self._clients.stop()

    # --- supervisor -------------------------------------------------------------------------------

    def _send(self, message: msgspec.Struct) -> None:
        self._supervisor.write(framing.encode(message))

    def _on_message(self, message: Any) -> None:
        match message:
            case messages.Restore():
                self._rules = {rule.rule_id: rule for rule in message.rules}
                self._configured = set(message.configured)
                self._interfaces = message.interfaces
                self._carried_out = dict.fromkeys(message.carried_out)
                self._log.info("Control plane worker started")
                self._send(messages.Ready())
                self._clients.start()
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
        self,
        add: tuple[Rule, ...],
        remove: tuple[str, ...],
        configured: tuple[str, ...] | None = None,
        change_id: str | None = None,
    ) -> list[str]:
        """Let the supervisor change rules; return warnings. Raises RelayError, and nothing is changed then."""
        after = self._after(add, remove)
        done = await self._ask(lambda number: messages.ApplyRules(number, add, remove, configured, change_id))
        self._rules = after
        if change_id is not None:
            self._carried_out[change_id] = None
            if len(self._carried_out) > CARRIED_OUT_MAX:
                del self._carried_out[next(iter(self._carried_out))]
        self._configured = set(configured) if configured is not None else self._configured & set(after)
        return [*done.warnings, *chain_warnings(add, after, self._interfaces)]

    def _after(self, add: tuple[Rule, ...], remove: tuple[str, ...]) -> dict[str, Rule]:
        """The rules that there would be. Raises RelayError when they can't be together."""
        gone = frozenset(remove)
        after = {rule_id: rule for rule_id, rule in self._rules.items() if rule_id not in gone}
        after |= {rule.rule_id: rule for rule in add}
        check_room(after.values())
        check_cycles(add, after, self._interfaces)
        check_protected(after.values(), self._interfaces)
        return after

    # --- clients ----------------------------------------------------------------------------------

    async def _reply(self, line: bytes, peer: Peer) -> bytes:
        """The answer to one line. Large requests are dealt with one by one: decoded they take ten times the memory."""
        if len(line) <= CHUNK_BYTES:
            return await self._answer(line, peer)
        async with self._large:
            return await self._answer(line, peer)

    async def _answer(self, line: bytes, peer: Peer) -> bytes:
        """Whatever is wrong with a line is told to its client alone."""
        uid = peer.uid
        try:
            request = framing.decode(self._decoder, line)
        except msgspec.MsgspecError as error:
            self._log.warning("Request refused: not valid", uid=uid)
            return encode(api.Answer(ok=False, error=f"not a valid request: {error}"))
        kind = type(request).__struct_config__.tag
        note = self._log.debug if _only_looks(request) else self._log.info
        note(f"Received command {kind}", uid=uid)
        try:
            authorise(request, peer)
            rounds = self._rounds.get(type(request))
            return await rounds.join() if rounds is not None else encode(await self._obey(request))
        except RelayError as error:
            self._log.warning(f"Command {kind} refused: {error}", uid=uid)
            return encode(api.Answer(ok=False, error=str(error)))

    async def _obey(self, request: api.Request) -> api.Answer:
        match request:
            case api.AddRules():
                return await self._add(request)
            case api.RemoveRules():
                return await self._remove(request)
            case api.ChangeRules():
                return await self._exchange(request)
            case api.LogLevel():
                levels = await self._ask(
                    lambda number: messages.LogLevel(number, request.level, request.facility, request.core)
                )
                return api.Answer(ok=True, result=levels.levels)
            case api.Restart():
                await self._ask(messages.Restart)
                return api.Answer(ok=True)
            case _:
                return api.Answer(ok=True, result={"version": VERSION, "interfaces": self._interfaces})

    async def _add(self, request: api.AddRules) -> api.Answer:
        wanted = [named(validate_unnamed(rule)) for rule in request.rules]
        ids = [rule.rule_id for rule in wanted]
        warnings: list[str] = []
        async with self._turn():
            if request.change_id in self._carried_out:
                return api.Answer(ok=True, result={"rule_ids": ids, "unchanged": [], "replaced": []})
            add, replaced = merge(self._rules, wanted, request.replace)
            if add:
                self._check_interfaces(add)
                warnings = await self._change(add, replaced, None, request.change_id)
        added = {rule.rule_id for rule in add}
        unchanged = [rule_id for rule_id in ids if rule_id not in added]
        result = {"rule_ids": ids, "unchanged": unchanged, "replaced": replaced}
        return api.Answer(ok=True, result=result, warnings=tuple(warnings))

    async def _remove(self, request: api.RemoveRules) -> api.Answer:
        async with self._turn():
            if request.change_id in self._carried_out:
                return api.Answer(ok=True, result={"rule_ids": request.rule_ids})
            for rule_id in request.rule_ids:
                if rule_id not in self._rules:
                    raise ControlError(f"no rule {rule_id}: `mcrctl list-rules` shows those there are")
            warnings = await self._change((), request.rule_ids, None, request.change_id)
        return api.Answer(ok=True, result={"rule_ids": request.rule_ids}, warnings=tuple(warnings))

    async def _exchange(self, request: api.ChangeRules) -> api.Answer:
        wanted = [named(validate_unnamed(rule)) for rule in request.add]
        warnings: list[str] = []
        async with self._turn():
            if request.change_id in self._carried_out:
                ids = tuple(rule.rule_id for rule in wanted)
                return api.Answer(ok=True, result=api.Changed(ids, (), request.remove))
            if request.based_on not in (None, fingerprint(self._rules.values())):
                raise ControlError("the rules have changed since they were compared: compare again")
            add, replaced = merge(self._rules, wanted, replace=True)
            for rule_id in request.remove:
                if rule_id not in self._rules:
                    raise ControlError(f"no rule {rule_id}: `mcrctl list-rules` shows those there are")
            self._check_interfaces(add)
            remove = (*replaced, *request.remove)
            after = self._after(add, remove)
            configured = tuple(sorted(after)) if request.is_configuration else None
            is_other = bool(add or remove) or (configured is not None and self._configured != set(configured))
            if is_other and not request.check_only:
                warnings = await self._change(add, remove, configured, request.change_id)
        new = tuple(rule.rule_id for rule in add if rule.rule_id not in frozenset(replaced))
        return api.Answer(ok=True, result=api.Changed(new, replaced, request.remove), warnings=tuple(warnings))

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """Wait for a client's turn to change rules. Raises ControlError when too many wait already."""
        if self._changes >= CHANGES_MAX:
            raise ControlError(f"{self._changes} changes wait for their turn: try again")
        self._changes += 1
        try:
            async with self._changing:
                yield
        finally:
            self._changes -= 1

    async def _get_stats(self) -> bytes:
        return encode(api.Answer(ok=True, result=await self._ask(messages.GetStats)))

    async def _list_workers(self) -> bytes:
        return encode(api.Answer(ok=True, result=(await self._ask(messages.ListWorkers)).workers))

    async def _get_options(self) -> bytes:
        told = await self._ask(messages.GetOptions)
        return encode(api.Answer(ok=True, result=api.StartedWith(told.options, told.command_line, told.file)))

    async def _list_rules(self) -> bytes:
        stats = await self._ask(messages.GetStats)
        installed = {rule.rule_id: rule for rule in stats.rules}
        rules = [_listed(rule, installed.get(rule_id), self._interfaces) for rule_id, rule in self._rules.items()]
        return encode(api.Answer(ok=True, result=rules))

    def _check_interfaces(self, rules: tuple[Rule, ...]) -> None:
        """Raises ControlError for a name that is no interface now: more likely misspelt than on its way."""
        existing = self._kernel.names()
        for rule in rules:
            names = [output.interface for output in rule.outputs]
            names += [leg.interface for leg in legs(rule) if leg.interface]
            for name in names:
                if name not in existing:
                    raise ControlError(
                        f"rule {rule.rule_id}: no interface {name}: this host has {', '.join(sorted(existing))}"
                    )


def _only_looks(request: api.Request) -> bool:
    """Whether a request changes nothing: a screen or a scraper may send it every second, for days.

    A ping is one that an operator sends to see the relay answer, in its log, too.
    """
    match request:
        case api.ListRules() | api.GetStats() | api.ListWorkers() | api.GetOptions():
            return True
        case api.LogLevel():
            return request.level is None
        case api.ChangeRules():
            return request.check_only
        case _:
            return False


def _listed(rule: Rule, installed: messages.RuleStats | None, interfaces: tuple[str, ...]) -> dict[str, Any]:
    """A rule as `list-rules` tells it: with the interfaces it listens on, its state, and where its counters are."""
    listed: dict[str, Any] = msgspec.to_builtins(rule)
    listed["input_interfaces"] = [rule.input_interface] if rule.input_interface else interfaces
    if installed is None:
        return {**listed, "state": "waiting: not installed yet", "slot": None, "output_slots": [], "input_rings": []}
    slots = [output.slot for output in installed.outputs]
    places = {"slot": installed.slot, "output_slots": slots, "input_rings": installed.input_rings}
    return {**listed, "state": installed.state, **places}
