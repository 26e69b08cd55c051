"""Rules written into a configuration file, which keeps its comments, its order and what did not change byte for byte.

An entry whose rules are all active as it says stays as it is, also one with ranges. One of a single rule is changed key
by key; what is left of a range is written out; an entry of which nothing is active goes, with the comment above it.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import msgspec
import tomlkit
from tomlkit.items import Array

from relay.configfile import Entry, Examined, examine
from relay.errors import ConfigError
from relay.rules import LATER_FIELDS, Output, Rule, output_name
from relay.toml_lines import lines_of

HEADER = re.compile(r"\s*\[\[\s*(rules|\"rules\"|'rules')\s*\]\]")
LINE_CHARS_MAX = 100
FILE_MODE = 0o644
UNFINISHED = ".unfinished"
SHOWN_MAX = 3  # rules that a warning names


@dataclass
class Block:
    """The lines of an entry, by number from 0: its comment, its header, and the end of its content."""

    comment: int
    header: int
    end: int


def updated(text: str, where: str, active: Iterable[Rule], warn: Callable[[str], object] = lambda _: None) -> str:
    """The text of a file with exactly these rules. Raises ConfigError for a text that is not right, and names it.

    `warn` is given a line for each range that can't stay, as it would say what is no longer so.
    """
    rules = {rule.rule_id: rule for rule in active}
    examined = examine(text, where)
    if examined.findings:
        raise ConfigError(f"{examined.findings[0]}: the file must be right before rules are saved to it")
    lines = text.split("\n")
    kept = dict(rules)
    changes = [entry for entry in examined.entries if not _is_active(entry, rules)]
    for entry, block in zip(reversed(changes), _blocks(examined, lines, reversed(changes)), strict=True):
        new = _entry_lines(entry, lines[block.header : block.end], rules)
        start, end = (block.header if new else block.comment), block.end
        has_gap_before = start == 0 or not lines[start - 1].strip()
        while not new and has_gap_before and end < len(lines) - 1 and not lines[end].strip():
            end += 1  # the gap behind it goes with the entry
        lines[start:end] = new
    for entry in examined.entries:
        for rule in entry.rules:
            kept.pop(rule.rule_id, None)
    for entry in changes:
        if reason := _split(entry, rules):
            warn(f"{where}:{lines_of(text)['rules', entry.index]}: rules[{entry.index}]: {reason}")
    changed = _with_appended("\n".join(lines), kept.values())
    _verify(changed, where, examined, rules)
    return changed


def _is_active(entry: Entry, rules: Mapping[str, Rule]) -> bool:
    return all(rules.get(rule.rule_id) == rule for rule in entry.rules)


def _blocks(examined: Examined, lines: list[str], entries: Iterable[Entry]) -> Iterable[Block]:
    """Where entries stand. Raises ConfigError for one that is no table of its own."""
    places = lines_of(examined.text)
    headers = sorted(line - 1 for path, line in places.items() if path[0] == "rules" and len(path) == 2)
    for entry in entries:
        header = places["rules", entry.index] - 1
        if not HEADER.match(lines[header]):
            place = f"{examined.file}:{header + 1}: rules[{entry.index}]"
            raise ConfigError(f"{place}: write each rule as [[rules]], so that it can be changed")
        later = [line for line in headers if line > header]
        end = later[0] if later else len(lines)
        while not lines[end - 1].strip() or lines[end - 1].lstrip().startswith("#"):
            end -= 1
        comment = header
        while comment and lines[comment - 1].lstrip().startswith("#"):
            comment -= 1
        yield Block(comment, header, end)


def _entry_lines(entry: Entry, lines: list[str], rules: Mapping[str, Rule]) -> list[str]:
    """What takes the place of an entry that is not active as it stands."""
    left = [rules[rule.rule_id] for rule in entry.rules if rule.rule_id in rules]
    text = "\n".join(lines)
    if len(entry.rules) == 1 and left and not _has_fields(tomlkit.parse(text).unwrap()):
        return _edited(entry.rules[0], left[0], text).split("\n")
    return "\n".join(map(written, left)).rstrip("\n").split("\n") if left else []


def _split(entry: Entry, rules: Mapping[str, Rule]) -> str | None:
    """Why a range is written out rule by rule; None for what is no range, or is gone as a whole."""
    left = [rule for rule in entry.rules if rule.rule_id in rules]
    if len(entry.rules) == 1 or not left:
        return None
    changed = [rule.rule_id for rule in left if rules[rule.rule_id] != rule]
    gone = [rule.rule_id for rule in entry.rules if rule.rule_id not in rules]
    what = [*_named(changed, "has changed", "have changed"), *_named(gone, "is gone", "are gone")]
    entries = f"{len(left)} {'entry' if len(left) == 1 else 'entries'}"
    return f"{', '.join(what)}, which its range of {len(entry.rules)} rules can't say: written out as {entries}"


def _named(rule_ids: list[str], one: str, several: str) -> Iterator[str]:
    """`rule a is gone`, `rules a, b, c and 7 more are gone`; nothing for none."""
    if len(rule_ids) == 1:
        yield f"rule {rule_ids[0]} {one}"
    elif rule_ids:
        more = f" and {len(rule_ids) - SHOWN_MAX} more" if len(rule_ids) > SHOWN_MAX else ""
        yield f"rules {', '.join(rule_ids[:SHOWN_MAX])}{more} {several}"


def _has_fields(value: Any) -> bool:
    """Whether a text in there has a field of a range, such as {port}."""
    if isinstance(value, str):
        return "{" in value
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(map(_has_fields, parts))


def _edited(before: Rule, after: Rule, text: str) -> str:
    """The text of one entry with those keys changed that differ."""
    document = tomlkit.parse(text)
    table: Any = document["rules"][0]
    for key, value in _values(after).items():
        if key == "outputs" and isinstance(table["outputs"], Array):
            _edit_outputs(table["outputs"], before.outputs, after.outputs)
        elif getattr(before, key) != getattr(after, key):
            table[key] = value
    for key in set(Rule.__struct_fields__) - set(_values(after)):
        if key in table:
            del table[key]
    return document.as_string().rstrip("\n")


def _edit_outputs(array: Array, before: tuple[Output, ...], after: tuple[Output, ...]) -> None:
    """Change those elements of an array that differ; the others keep their form and their comments."""
    for kind, start, end, new_start, new_end in reversed(SequenceMatcher(None, before, after, False).get_opcodes()):
        if kind == "equal":
            continue
        values = [_output_value(output) for output in after[new_start:new_end]]
        both = min(end - start, len(values))
        for index in reversed(range(start + both, end)):
            del array[index]
        for index, value in enumerate(values[:both], start):
            array[index] = value
        for index, value in enumerate(values[both:], start + both):
            array.insert(index, value)


def _output_value(output: Output) -> Any:
    """An output as a text, or as a table where a text can't say it all."""
    if output.dscp is None:
        return output_name(output) + (f":{output.ttl}" if output.ttl is not None else "")
    table = tomlkit.inline_table()
    table.update({key: value for key, value in msgspec.to_builtins(output).items() if value is not None})
    return table


def _values(rule: Rule) -> dict[str, Any]:
    """The keys of a rule that are not what they are by default."""
    values = {key: getattr(rule, key) for key in Rule.__struct_fields__}
    values["outputs"] = array = tomlkit.array()
    for output in rule.outputs:
        array.append(_output_value(output))
    if rule.secondary is not None:
        values["secondary"] = tomlkit.inline_table()
        given = msgspec.to_builtins(rule.secondary)
        values["secondary"].update({key: value for key, value in given.items() if value is not None})
    return {key: value for key, value in values.items() if value is not None and value is not False}


def written(rule: Rule) -> str:
    """A rule as an entry of its own."""
    values = _values(rule)
    outputs = values.pop("outputs")
    if len(outputs.as_string()) > LINE_CHARS_MAX:
        outputs = outputs.multiline(True)
    order = ("rule_id", "input_group", "input_port", "input_interface", "source", "preserve_source", *LATER_FIELDS)
    items = [(key, tomlkit.item(values[key])) for key in order if key in values]
    lines = [f"{key} = {item.as_string()}" for key, item in (*items, ("outputs", outputs))]
    return "\n".join(("[[rules]]", *lines, ""))


def _with_appended(text: str, rules: Iterable[Rule]) -> str:
    """The text with more entries at its end, an empty line before each."""
    end = "\r\n" if "\r\n" in text else "\n"
    for rule in rules:
        gap = "" if not text else end if text.endswith("\n") else end * 2
        text += gap + written(rule).replace("\n", end)
    return text


def _verify(text: str, where: str, before: Examined, rules: Mapping[str, Rule]) -> None:
    """Raises ConfigError when a text would not say what it is meant to: nothing is written then."""
    after = examine(text, where)
    if after.findings or after.options != before.options or {rule.rule_id: rule for rule in after.rules} != rules:
        reason = str(after.findings[0]) if after.findings else "its rules could not be changed in place"
        raise ConfigError(f"{where} is left as it was: {reason}: save to another file")


def replace_file(path: Path, text: str) -> None:
    """Replace a file at once, or what a link leads to; owner and mode stay. Raises ConfigError, and leaves it then."""
    path = path.resolve()
    unfinished = path.with_name(f".{path.name}{UNFINISHED}")
    try:
        with contextlib.suppress(FileNotFoundError):
            unfinished.unlink()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(unfinished, flags, FILE_MODE), "wb") as file:
            if path.exists():
                status = path.stat()
                os.fchmod(file.fileno(), status.st_mode & 0o7777)
                with contextlib.suppress(PermissionError):  # then it becomes the caller's own
                    os.fchown(file.fileno(), status.st_uid, status.st_gid)
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} not written: {error.strerror}: give a file in a directory of yours") from error
