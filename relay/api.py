"""What clients ask the relay, and its answers: one JSON object a line over the control socket.

{"type": "ping"}
{"ok": true, "result": {"version": "0.1.0"}, "warnings": []}
"""

from typing import Any

import msgspec

from relay.rules import Rule

REQUEST_BYTES_MAX = 16 << 20  # RULES_MAX rules of some outputs each


class AddRules(msgspec.Struct, tag="add-rules", forbid_unknown_fields=True):
    """Make these rules active, all or none."""

    rules: tuple[Rule, ...]
    replace: bool = False


class RemoveRules(msgspec.Struct, tag="remove-rules", forbid_unknown_fields=True):
    """Remove these rules, all or none."""

    rule_ids: tuple[str, ...]


class ListRules(msgspec.Struct, tag="list-rules", forbid_unknown_fields=True):
    """The active rules."""


class GetStats(msgspec.Struct, tag="get-stats", forbid_unknown_fields=True):
    """Totals, rates and drops: of the relay, of each rule, output and worker."""


class ListWorkers(msgspec.Struct, tag="list-workers", forbid_unknown_fields=True):
    """The workers with their counters."""


class Ping(msgspec.Struct, tag="ping", forbid_unknown_fields=True):
    """Whether the relay serves."""


class Restart(msgspec.Struct, tag="restart", forbid_unknown_fields=True):
    """Start anew from what is installed now, with the same sockets: no datagram is lost."""


class LogLevel(msgspec.Struct, tag="log-level", forbid_unknown_fields=True):
    """The log levels of rings, changed first when `level` is given."""

    level: str | None = None
    facility: str | None = None
    core: int | None = None


Request = AddRules | RemoveRules | ListRules | GetStats | ListWorkers | Ping | LogLevel | Restart


class Answer(msgspec.Struct):
    """`result` depends on the request; `error` stands when `ok` is false, and nothing was changed then."""

    ok: bool
    result: Any = None
    error: str | None = None
    warnings: tuple[str, ...] = ()
