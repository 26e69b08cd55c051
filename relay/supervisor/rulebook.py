"""The rule book: the active rules, which of them the configuration put there, and the changes that were made.

Owned by the supervisor's thread, which has the data path go over to them (fleet.py). It outlives the supervisor in the
state file.
"""

from collections import deque
from collections.abc import Iterator, Sequence

import msgspec

from relay.messages import ApplyRules, Configure, Restore
from relay.rules import Rule, check_cycles, check_protected, describe, validate
from relay.supervisor.state import VERSION, State, StateFile
from relay.wording import counted

CARRIED_OUT_KEPT = 64  # of the ids of clients' changes, in the state file: clients come back within seconds
CARRIED_OUT_MAX = 4096  # clients' changes that are remembered: a client asks again within half a minute
RULES_LOGGED_MAX = 200  # of one change: the supervisor's ring holds 1 024 records


class RuleBook:
    """What rules there are, and why."""

    def __init__(self, configured: Sequence[Rule], file: StateFile[State]) -> None:
        """Begin with what the state file tells; `load` says how that went."""
        self.rules: dict[str, Rule] = {}
        self.configured = tuple(configured)  # what a new control plane is told to install
        self._configured_ids: tuple[str, ...] = ()
        self._carried_out: deque[str] = deque(maxlen=CARRIED_OUT_MAX)
        self._file = file

    def load(self) -> list[str]:
        """Take over what a former supervisor wrote down; return lines for the log."""
        lines = self._file.prepare()
        state, damage = self._file.load()
        if state is not None:
            self.rules = {rule.rule_id: rule for rule in state.rules}
            self._configured_ids = state.configured
            self._carried_out.extend(state.carried_out)
            go = "goes" if len(state.rules) == 1 else "go"
            lines.append(f"{counted(len(state.rules), 'rule')} of {self._file.path} {go} on")
        return [*lines, *damage]

    def save(self) -> None:
        """Write it down. Raises RelayError."""
        recent = tuple(self._carried_out)[-CARRIED_OUT_KEPT:]
        self._file.save(State(VERSION, tuple(self.rules.values()), self._configured_ids, recent))

    def remove_file(self) -> None:
        """Leave nothing to the next supervisor."""
        self._file.remove()

    def greeting(self, interfaces: tuple[str, ...]) -> Iterator[msgspec.Struct]:
        """What a new control plane is told first: the active rules, then the configuration's."""
        yield Restore(tuple(self.rules.values()), self._configured_ids, interfaces, tuple(self._carried_out))
        yield Configure(self.configured)

    def after(self, request: ApplyRules, interfaces: Sequence[str]) -> dict[str, Rule]:
        """The rules that a change would leave, each checked again: who asks is less privileged. Raises RuleError."""
        gone = frozenset(request.remove)
        wanted = {rule_id: rule for rule_id, rule in self.rules.items() if rule_id not in gone}
        added = {rule.rule_id: validate(rule) for rule in request.add}
        wanted |= added
        check_cycles(added.values(), wanted, interfaces)
        check_protected(wanted.values(), interfaces)
        return wanted

    def adopt(self, rules: dict[str, Rule], request: ApplyRules) -> None:
        """Go over to what `after` gave."""
        self.rules = rules
        self._remember_configured(request)
        if request.change_id is not None:
            self._carried_out.append(request.change_id)

    def _remember_configured(self, request: ApplyRules) -> None:
        """What a new control plane is told to install is what has been made of the configuration since it was read."""
        if request.configured is not None:
            self._configured_ids = request.configured
            self.configured = tuple(self.rules[rule_id] for rule_id in request.configured if rule_id in self.rules)
            return
        touched = {*request.remove, *(rule.rule_id for rule in request.add)}
        self.configured = tuple(
            self.rules.get(rule.rule_id, rule) if rule.rule_id in touched else rule
            for rule in self.configured
            if rule.rule_id not in touched or rule.rule_id in self.rules
        )

    def differences(self, former: dict[str, Rule]) -> Iterator[tuple[str, dict[str, str]]]:
        """A line for each rule that changed, and what it is about; beyond RULES_LOGGED_MAX, one with their count."""
        lines = [(rule_id, f"Rule {rule_id} removed") for rule_id in former if rule_id not in self.rules]
        for rule_id, rule in self.rules.items():
            before = former.get(rule_id)
            if before != rule:
                lines.append((rule_id, f"Rule {rule_id} {'replaced' if before else 'added'}: {describe(rule)}"))
        for rule_id, line in lines[:RULES_LOGGED_MAX]:
            yield line, {"rule": rule_id}
        if len(lines) > RULES_LOGGED_MAX:
            yield f"{counted(len(lines) - RULES_LOGGED_MAX, 'more rule')} added, replaced or removed", {}
