"""What the relay can be asked, and how its answers read. Pure: bytes in, bytes and values out.

Both clients (client.py, async_client.py) send and receive what is made here, so they can't differ. A line is a request
or an answer in JSON, as relay/api.py has them.
"""

import errno
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from relay import api
from relay.errors import ControlError, UnreachableError
from relay.messages import Stats, WorkerStats
from relay.rules import Rule

TIMEOUT_S = 30.0  # ten thousand rules are installed in a fraction of it
SILENCE_S = 2.0  # then whoever waits is told for what; a restart answers sooner
RETRY_S = 0.02
RESTART_S_MAX = 30.0
RESTART_POLL_S = 0.05
RECEIVE_BYTES = 1 << 18
# A level set twice is set. A restart is not repeated: each one would start the relay anew.
REPEATED = (
    api.Change | api.GetOptions | api.ListRules | api.GetStats | api.ListWorkers | api.LogLevel | api.Ping
)  # fmt: skip

Result = TypeVar("Result")


class BrokenError(Exception):
    """The connection ended before the answer."""


@dataclass(frozen=True)
class Call(Generic[Result]):
    """A request with the type of its result."""

    request: api.Request
    result: Any  # type[Result]; list[…] is no type to a type checker

    def read(self, answer: api.Answer) -> Result:
        """The result of an answer. Raises ControlError for one of another shape, as another version may send."""
        result = answer.result
        if isinstance(self.request, api.AddRules | api.RemoveRules):
            result = {**result, "warnings": answer.warnings}
        try:
            converted: Result = msgspec.convert(result, self.result)
        except msgspec.ValidationError as error:
            raise ControlError(
                f"the relay's answer can't be read: {error}: use a client of the relay's version"
            ) from error
        return converted


def ping() -> Call[api.Pong]:
    """Whether the relay serves."""
    return Call(api.Ping(), api.Pong)


def stats() -> Call[Stats]:
    """Totals, rates and drops."""
    return Call(api.GetStats(), Stats)


def rules() -> Call[list[api.ActiveRule]]:
    """The active rules."""
    return Call(api.ListRules(), list[api.ActiveRule])


def workers() -> Call[list[WorkerStats]]:
    """The workers."""
    return Call(api.ListWorkers(), list[WorkerStats])


def add_rules(added: Iterable[Rule], replace: bool) -> Call[api.Added]:
    """Make rules active, all or none."""
    return Call(api.AddRules(tuple(added), replace), api.Added)


def remove_rules(rule_ids: Iterable[str]) -> Call[api.Removed]:
    """Remove rules, all or none."""
    return Call(api.RemoveRules(tuple(rule_ids)), api.Removed)


def log_level(level: str | None, facility: str | None, core: int | None) -> Call[dict[str, str]]:
    """The levels of rings, changed first when `level` is given."""
    return Call(api.LogLevel(level, facility, core), dict[str, str])


def repeatable(request: api.Request) -> api.Request:
    """The request with an id, under which the relay makes a change once however often it is asked to."""
    if isinstance(request, api.Change) and request.change_id is None:
        return msgspec.structs.replace(request, change_id=os.urandom(16).hex())
    return request


def encode(request: api.Request) -> bytes:
    """A request as it is sent."""
    return msgspec.json.encode(request) + b"\n"


def decode(line: bytes) -> api.Answer:
    """An answer. Raises ControlError when it is a refusal, or none at all."""
    try:
        answer = msgspec.json.decode(line, type=api.Answer)
    except msgspec.MsgspecError as error:
        raise ControlError(f"no answer of a relay: {error}: give the control socket of mcrd") from error
    if not answer.ok:
        raise ControlError(answer.error or "refused without a reason")
    return answer


class Line:
    """Collects received bytes until they are a line."""

    def __init__(self) -> None:
        self._received = bytearray()

    def feed(self, received: bytes) -> bytes | None:
        """The whole line once it is there. Raises BrokenError for the end of the stream before."""
        if not received:
            raise BrokenError("the relay closed the connection")
        self._received += received
        return bytes(self._received) if received.endswith(b"\n") else None


def pids(workers: Iterable[Mapping[str, Any]]) -> frozenset[int]:
    """The workers' processes, of an answer as it came: before and after a restart it may be of different versions."""
    return frozenset(worker["pid"] for worker in workers)


def are_replaced(workers: Iterable[Mapping[str, Any]], former: frozenset[int]) -> bool:
    """Whether every worker runs and is none of the former ones."""
    return all(worker["state"] == "running" and worker["pid"] not in former for worker in workers)


# --- errors -----------------------------------------------------------------------------------------


def unreachable(path: Path, error: OSError) -> UnreachableError:
    """Nobody answers at `path`."""
    reason = error.strerror or str(error)
    remedy = "start one with `sudo mcrd --interface …` or `sudo make run IFACE=…`, or give --socket or --instance"
    if error.errno == errno.EAGAIN:
        reason = "its queue of clients stayed full"
    elif error.errno == errno.EACCES:
        remedy = "ask as root, or as a member of the relay's --socket-group"
    return UnreachableError(f"no relay answers on {path}: {reason}: {remedy}")


def too_slow(path: Path, timeout_s: float) -> UnreachableError:
    """No answer in time."""
    return UnreachableError(
        f"{path}: no answer within {timeout_s:g} s: if its mcrd is gone, start it again with the same options: "
        "workers relay meanwhile, and it takes them over"
    )


def silent(path: Path, gone_pid: int | None, left_s: float) -> str:
    """What to tell who waits for an answer. `gone_pid`: of the mcrd behind `path`, if it is known to have ended."""
    who = "mcrd does not answer: is it running?"
    if gone_pid is not None:
        who = f"mcrd (pid {gone_pid}) is gone: start it again with the same options, and it answers:"
    return f"{path}: {who} waiting {left_s:.0f} s more"


def lost(path: Path, request: api.Request, reason: str) -> UnreachableError:
    """The connection broke before the answer, and there is no more time to ask again."""
    known = ""
    if isinstance(request, api.Change):
        known = ": `mcrctl list-rules` tells whether it made the change"
    return UnreachableError(f"{path}: {reason} before it answered{known}")


def not_replaced(path: Path, timeout_s: float) -> UnreachableError:
    """A restart took too long."""
    return UnreachableError(f"{path}: not all workers were replaced in {timeout_s:.0f} s: see the log")
