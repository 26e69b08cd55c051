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


class ChangeRules(msgspec.Struct, tag="change-rules", forbid_unknown_fields=True):
    """Remove some rules and add others at once, all or nothing: a rule of `add` that exists is replaced.

    `based_on`, the fingerprint (relay/rules.py) of the rules that this was made for, has it refused when they have
    changed since. `is_configuration`: the rules are those of the configuration file then, as after SIGHUP.
    `check_only` says what would be refused, and changes nothing. `change_id` as for AddRules.
    """

    add: Annotated[tuple[Rule, ...], Meta(max_length=RULES_MAX)] = ()
    remove: Annotated[tuple[Text, ...], Meta(max_length=RULES_MAX)] = ()
    based_on: Annotated[str, Meta(max_length=64)] | None = None
    is_configuration: bool = False
    check_only: bool = False
    change_id: ChangeId | None = None


class GetOptions(msgspec.Struct, tag="get-options", forbid_unknown_fields=True):
    """What the relay was started with."""


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


Change = AddRules | RemoveRules | ChangeRules
Request = Change | GetOptions | ListRules | GetStats | ListWorkers | Ping | LogLevel | Restart


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
    """Of Ping; `interfaces` are those that the relay takes in from by default."""

    version: str
    interfaces: tuple[str, ...] = ()


class Added(msgspec.Struct, frozen=True):
    """Of AddRules: the ids in the order of the request; those of rules that were active already; what to know.

    `replaced` are those that had other content.
    """

    rule_ids: tuple[str, ...]
    unchanged: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()


class Removed(msgspec.Struct, frozen=True):
    """Of RemoveRules."""

    rule_ids: tuple[str, ...]
    warnings: tuple[str, ...] = ()


class ActiveRule(Rule, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """One of ListRules: "active", or "waiting: <why>"; where it takes in, and where its counters are.

    Slots are those of the stats segments, one for the rule (None before it is installed), one for each output; rings
    are its interfaces as records of streams name them.
    """

    state: str
    input_interfaces: tuple[str, ...] = ()
    slot: int | None = None
    output_slots: tuple[int, ...] = ()
    input_rings: tuple[int, ...] = ()


class Changed(msgspec.Struct, frozen=True):
    """Of ChangeRules: ids."""

    added: tuple[str, ...]
    replaced: tuple[str, ...]
    removed: tuple[str, ...]


class StartedWith(msgspec.Struct, frozen=True):
    """Of GetOptions: options in effect, the names of those from the command line, and the configuration file."""

    options: dict[str, Any]
    command_line: tuple[str, ...] = ()
    file: str | None = None
