"""Rules: their names and places, asked of the relay in a thread of their own, and only when its rule table changed.

A question costs the relay a line in its log and, with ten thousand rules, some of the supervisor's time: never more of
it than a tenth.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from relay import api
from relay.addresses import endpoint
from relay.cli.top.rates import Places
from relay.cli.top.segments import State, empty_places, same_segments
from relay.cli.top.streams import Inputs
from relay.client import Client
from relay.errors import RelayError
from relay.rules import Output, output_name

ASK_TIMEOUT_S = 10.0
ASK_INTERVAL_S_MIN = 0.5
RETRY_S = 0.2  # of a question that got no answer, which costs the relay nothing
SHARE_OF_TIME = 10  # an answer that took a second is not asked for again for ten


@dataclass(frozen=True)
class Rules:
    """The rules at one moment, in the relay's order."""

    ids: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    searched: list[str] = field(default_factory=list)  # what a filter looks at, in lower case
    places: Places = field(default_factory=empty_places)
    taken_in: Inputs = field(default_factory=Inputs)

    def waiting(self) -> int:
        """How many are not active."""
        return sum(state != "active" for state in self.states)


def from_answer(answer: list[dict[str, Any]]) -> Rules:
    """Rules from what `list-rules` answers; those that are not installed yet have no counters and are left out."""
    listed = [rule for rule in answer if rule["slot"] is not None]
    inputs = [endpoint(rule["input_group"], rule["input_port"]) for rule in listed]
    outputs = [[output_name(Output(**output)) for output in rule["outputs"]] for rule in listed]
    return Rules(
        ids=[rule["rule_id"] for rule in listed],
        inputs=inputs,
        outputs=[names[0] + (f" +{len(names) - 1}" if len(names) > 1 else "") for names in outputs],
        states=[rule["state"] for rule in listed],
        searched=[
            " ".join((rule["rule_id"], input_, rule["source"] or "", *names, rule["state"])).lower()
            for rule, input_, names in zip(listed, inputs, outputs, strict=True)
        ],
        places=Places.of([(rule["slot"], rule["output_slots"]) for rule in listed]),
        taken_in=Inputs.of(
            [(r["input_group"], r["input_port"], r["source"], r.get("input_rings", ())) for r in listed]
        ),
    )


class Asker:
    """Asks for the rules in a thread. `poll` gives an answer once, when it has come."""

    def __init__(self, path: Path, wake: Callable[[], None]) -> None:
        self._path = path
        self._wake = wake
        self._thread: threading.Thread | None = None
        self._answer: Rules | None = None
        self._next_s = 0.0
        self.asked_for: State = ()  # what the segments were before the last question that is answered
        self._asking_for: State = ()
        self.error: str | None = None  # why the last question got no answer

    def now(self, state: State) -> Rules:
        """Ask and wait for the answer. Raises RelayError."""
        began_s = time.monotonic()
        rules = _ask(self._path)
        self._rest(began_s)
        self.asked_for = state
        return rules

    def poll(self, state: State) -> Rules | None:
        """The rules, when an answer has come; asks again when `state` is another than that of the last answer."""
        if self._thread is not None:
            if self._thread.is_alive():
                return None
            self._thread.join()
            self._thread = None
            answer, self._answer = self._answer, None
            if answer is not None:
                self.asked_for = self._asking_for
                return answer
        is_new_relay = self.error is None and not same_segments(state, self._asking_for or self.asked_for)
        if state != self.asked_for and (is_new_relay or time.monotonic() >= self._next_s):
            self._asking_for = state
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        return None

    def _rest(self, began_s: float) -> None:
        now_s = time.monotonic()
        self._next_s = now_s + max(ASK_INTERVAL_S_MIN, SHARE_OF_TIME * (now_s - began_s))

    def _run(self) -> None:
        began_s = time.monotonic()
        try:
            self._answer, self.error = _ask(self._path), None
            self._rest(began_s)
        except RelayError as error:
            self.error = str(error)
            self._next_s = time.monotonic() + RETRY_S
        self._wake()


def _ask(path: Path) -> Rules:
    with Client(path, ASK_TIMEOUT_S) as client:
        return from_answer(client.ask(api.ListRules()).result)
