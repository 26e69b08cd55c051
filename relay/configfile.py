"""A configuration file: read and examined, with everything that is wrong found at once. Pure but for reading it.

Each finding names the file, the line, the key, and what is allowed there or what to do.
"""

import re
import tomllib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from relay.config import CHECKS, HINTS, Configuration, Options
from relay.conversion import faults
from relay.errors import ConfigError, RuleError
from relay.ranges import ConfiguredRule, expand, overlaps
from relay.rules import RULES_MAX, KeyPath, Rule, check_cycles, check_protected, check_room, find_cycle, group_by_input
from relay.toml_lines import lines_of, nearest_line


class Finding(msgspec.Struct, frozen=True):
    """Something wrong in a file: where, and what is allowed or what to do."""

    file: str
    line: int | None
    key: str  # such as `rules[3].outputs[0]`; "" for the file as a whole
    message: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {self.key}: {self.message}" if self.key else f"{place}: {self.message}"


class Entry(msgspec.Struct, frozen=True):
    """An entry of `[[rules]]` that is right, its place among them, and the rules that it stands for."""

    index: int
    configured: ConfiguredRule
    rules: tuple[Rule, ...]


class Examined(msgspec.Struct):
    """What a file says as far as it is right, and everything that is wrong."""

    file: str
    text: str
    options: dict[str, Any] = {}
    entries: list[Entry] = []
    findings: list[Finding] = []
    lines: dict[KeyPath, int] = {}  # made when the first finding wants them

    def add(self, path: KeyPath, message: str) -> None:
        """Note something wrong at a path such as ("rules", 0, "source")."""
        self.lines = self.lines or lines_of(self.text)
        key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
        self.findings.append(Finding(self.file, nearest_line(self.lines, path), key, message))

    @property
    def rules(self) -> tuple[Rule, ...]:
        """All rules, plain ones."""
        return tuple(rule for entry in self.entries for rule in entry.rules)


def read_text(path: Path) -> str:
    """The text of a file. Raises ConfigError."""
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: give a readable file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8: save the file as UTF-8") from None


def read(path: Path) -> tuple[dict[str, Any], tuple[Rule, ...]]:
    """The options that a file sets, by name, and its rules. Raises ConfigError."""
    return parse(read_text(path), str(path))


def parse(text: str, where: str) -> tuple[dict[str, Any], tuple[Rule, ...]]:
    """As `read`, of a text; `where` names it in errors. Raises ConfigError with the first of them."""
    examined = examine(text, where)
    if examined.findings:
        more = len(examined.findings) - 1
        hint = f" (and {more} more: `mcrctl config check` shows all)" if more else ""
        raise ConfigError(f"{examined.findings[0]}{hint}")
    return examined.options, examined.rules


def examine(text: str, where: str) -> Examined:
    """Read a text and find all that is wrong in it, each value and rule by itself and rules beside each other."""
    examined = Examined(where, text)
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        examined.findings.append(_not_toml(str(error), text, where))
        return examined
    except RecursionError:
        examined.findings.append(Finding(where, None, "", "nested too deep: no key needs more than three levels"))
        return examined
    shapes = list(faults(document, Configuration))
    for path, message in shapes:
        examined.add(path, f"{message}{HINTS.get(path, '')}")
    spoilt: dict[KeyPath, set[KeyPath]] = defaultdict(set)  # by option or rule: where in it
    for path, _ in shapes:
        depth = 2 if path[:1] == ("rules",) else 1
        spoilt[path[:depth]].add(path[depth:])
    for field in msgspec.structs.fields(Options):
        if field.name in document and (field.name,) not in spoilt:
            examined.options[field.name] = msgspec.convert(document[field.name], field.type)
    tables = document.get("rules", [])
    if isinstance(tables, list):
        for index, table in enumerate(tables):
            if isinstance(table, dict) and ("rules", index) in spoilt:
                _look_beside(examined, index, table, spoilt["rules", index])
        _expand(examined, [(i, table) for i, table in enumerate(tables) if ("rules", i) not in spoilt])
    examined.findings.sort(key=lambda finding: finding.line or 0)
    return examined


STAND_IN = {"input_group": "239.0.0.1", "input_port": 1}


def _look_beside(examined: Examined, index: int, table: dict[str, Any], spoilt: set[KeyPath]) -> None:
    """Find what is wrong with the rest of a table that has values of a wrong type."""
    keys = {path[0] for path in spoilt if path}
    rest = {key: value for key, value in table.items() if key not in keys or key == "outputs"}
    outputs = table.get("outputs")
    if not isinstance(outputs, list) or ("outputs",) in spoilt:
        outputs = []
    bad = {path[1] for path in spoilt if path[:1] == ("outputs",) and len(path) > 1}
    rest["outputs"] = [f"0.0.0.0:{i}:-" if i in bad else output for i, output in enumerate(outputs)]
    _, wrong = expand(msgspec.convert(STAND_IN | rest, ConfiguredRule))
    has_input = all(key in rest for key in STAND_IN)
    for path, message in wrong:
        if path[0] != "outputs" or (len(path) > 1 and has_input and path[1] not in bad):
            examined.add(("rules", index, *path), message)


def _not_toml(reason: str, text: str, where: str) -> Finding:
    """What tomllib says, with the line where it says it."""
    message, _, place = reason.rstrip(")").partition(" (at ")
    match = re.match(r"line (\d+), (column \d+)", place)
    line = int(match[1]) if match else text.count("\n") + 1
    return Finding(where, line, "", f"not valid TOML, {match[2] if match else place}: {message}")


def _expand(examined: Examined, tables: Sequence[tuple[int, Any]]) -> None:
    """Make the rules of each table, as long as a relay has room for them, and look for ids given twice and overlaps."""
    owners: dict[str, int] = {}
    for index, table in tables:
        configured = msgspec.convert(table, ConfiguredRule)
        rules, wrong = expand(configured)
        for path, message in wrong:
            examined.add(("rules", index, *path), message)
        if len(owners) + len(rules) > RULES_MAX:
            examined.add(("rules", index), f"more than {RULES_MAX} rules, which a relay has no room for: remove some")
            return
        twice = next((rule.rule_id for rule in rules if rule.rule_id in owners), None)
        if twice is not None:
            first = owners[twice]
            message = f"rule id {twice} is given twice, here and in rules[{first}]: choose another for one of them"
            examined.add(("rules", index), message)
            continue
        owners |= dict.fromkeys((rule.rule_id for rule in rules), index)
        examined.entries.append(Entry(index, configured, rules))
    for entry, rule, other in overlaps([entry.rules for entry in examined.entries]):
        examined.add(
            ("rules", examined.entries[entry].index),
            f"rule {rule.rule_id} overlaps with rule {other.rule_id}: {rule.input_group}:{rule.input_port} would leave "
            "twice through the same output: make one range smaller, or change an output",
        )


def check_together(examined: Examined) -> None:
    """Find what is wrong with what a file says as a whole, as far as that can be told without the machine."""
    options = examined.options
    for key, check in CHECKS.items():
        if options.get(key):
            try:
                check(options[key])
            except ConfigError as error:
                examined.add((key,), str(error))
    rules = examined.rules
    interfaces = options.get("interfaces", ())
    try:
        check_room(rules)
        check_cycles(rules, {rule.rule_id: rule for rule in rules}, interfaces)
    except RuleError as error:
        cycle = find_cycle(rules, group_by_input(rules), interfaces)
        where = next((e.index for e in examined.entries if cycle and any(r.rule_id == cycle[0] for r in e.rules)), None)
        examined.add(("rules",) if where is None else ("rules", where), str(error))
    try:
        check_protected(rules, interfaces)
    except RuleError as error:
        examined.add(("rules",), str(error))
    examined.findings.sort(key=lambda finding: finding.line or 0)
