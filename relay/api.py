"""What clients ask the relay, and its answers: one JSON object a line over the control socket.

{"type": "ping"}
{"ok": true, "result": {"version": "0.1.0"}, "warnings": []}
"""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from relay.rules import RULES_MAX, Rule, Text

REQUEST_BYTES_MAX = 16 << 20  # RULES_MAX rules of some outputs each
LOOK_BYTES_MAX = 4096  # of who may not change anything: no such request is longer
CHANGE_ID_CHARS_MAX = 64

ChangeId = Annotated[str, Meta(min_length=1, max_length=CHANGE_ID_CHARS_MAX)]


class AddRules(msgspec.Struct, tag="add-rules", forbid_unknown_fields=True):
    """Make these rules active, all or none.

    A client that got no answer may ask again with the same `change_id`: what was carried out is not done twice.
    """

    rules: Annotated[tuple[Rule, ...], Meta(max_length=RULES_MAX)]
    replace: bool = False
    change_id: ChangeId | None = None


class RemoveRules(msgspec.Struct, tag="remove-rules", forbid_unknown_fields=True):
    """Remove these rules, all or none. `change_id` as for AddRules."""

    rule_ids: Annotated[tuple[Text, ...], Meta(max_length=RULES_MAX)]
    change_id: ChangeId | None = None


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

    level: Annotated[str, Meta(max_length=32)] | None = None
    facility: Annotated[str, Meta(max_length=32)] | None = None
    core: Annotated[int, Meta(ge=0, le=1023)] | None = None


Request = AddRules | RemoveRules | ListRules | GetStats | ListWorkers | Ping | LogLevel | Restart


class Answer(msgspec.Struct):
    """`result` depends on the request; `error` stands when `ok` is false, and nothing was changed then."""

    ok: bool
    result: Any = None
    error: str | None = None
    warnings: tuple[str, ...] = ()


# --- results ------------------------------------------------------------------------------------------
# Of GetStats and ListWorkers: Stats and WorkerStats of relay/messages.py. Fields that come later have defaults, so that
# a client reads the answers of a relay that does not know them.


class Pong(msgspec.Struct, frozen=True):
    """Of Ping."""

    version: str


class Added(msgspec.Struct, frozen=True):
    """Of AddRules: the ids in the order of the request; those of rules that were active already; what to know."""

    rule_ids: tuple[str, ...]
    unchanged: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class Removed(msgspec.Struct, frozen=True):
    """Of RemoveRules."""

    rule_ids: tuple[str, ...]
    warnings: tuple[str, ...] = ()


class ActiveRule(Rule, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """One of ListRules: "active", or "waiting: <why>"."""

    state: str
