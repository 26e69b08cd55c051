"""JSON schemas of what clients ask the relay and of what commands answer with --json, made from their types. Pure.

`version` counts up when an answer changes so that who reads it must change, too: a key that is gone or means another
thing. Keys may be added at any time, and readers pass over those that they do not know.
"""

from typing import Any

import msgspec

from relay import api, messages
from relay.cli.checks.registry import Finding
from relay.cli.config import Applied, Checked, Saved
from relay.cli.explaining.facts import Explanation
from relay.differences import Differences
from relay.health import StreamHealth

VERSION = 1
DIALECT = "https://json-schema.org/draft/2020-12/schema"

# By the words of a command. The answer of a request to the relay itself is an `Answer` with this as its result.
ANSWERS: dict[str, Any] = {
    "add-rule": api.Added,
    "remove-rule": api.Removed,
    "list-rules": list[api.ActiveRule],
    "get-stats": messages.Stats,
    "streams": dict[str, list[StreamHealth]],
    "list-workers": list[messages.WorkerStats],
    "ping": api.Pong,
    "log-level get": dict[str, str],
    "log-level set": dict[str, str],
    "explain": Explanation,
    "doctor": list[Finding],
    "config check": Checked,
    "config diff": Differences,
    "config apply": Applied,
    "config save": Saved,
}


def document() -> dict[str, Any]:
    """One JSON document: `answers` by command, `request` and `answer` of the control socket, and what they refer to."""
    kinds = (api.Request, api.Answer, *ANSWERS.values())
    schemas, definitions = msgspec.json.schema_components(kinds, ref_template="#/$defs/{name}")
    request, answer, *of_commands = schemas
    return {
        "$schema": DIALECT,
        "title": "mcrctl",
        "version": VERSION,
        "answers": dict(zip(ANSWERS, of_commands, strict=True)),
        "request": request,
        "answer": answer,
        "$defs": definitions,
    }


def of_answer(command: str) -> dict[str, Any]:
    """The schema of one command's answer, complete in itself. Raises KeyError for a command without --json."""
    whole = document()
    return {"$schema": DIALECT, "$defs": whole["$defs"], **whole["answers"][command]}
