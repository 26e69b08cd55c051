"""mcrctl config: a file of rules and options checked, compared with the running relay, applied to it, saved from it."""

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec

from relay import api
from relay.cli.options import json_option, reports_errors, tell_silence
from relay.cli.telling import tell
from relay.client import Client
from relay.configfile import Examined, Finding, check_together, examine, read_text
from relay.differences import Differences, FieldChange, compare, compare_options
from relay.errors import ConfigError, ExitCode, UsageError
from relay.rules import Rule, chain_warnings, fingerprint, legs, limits_of, output_name
from relay.wording import counted

DIFF_FAILED = 2  # as of diff(1): 0 the same, 1 different, 2 trouble

file_argument = click.argument("file", metavar="FILE", type=click.Path(path_type=Path))


class Checked(msgspec.Struct, frozen=True):
    """The answer of `config check`."""

    ok: bool
    rules: int
    errors: tuple[Finding, ...]
    warnings: tuple[str, ...]


class Applied(msgspec.Struct, frozen=True):
    """The answer of `config apply`: what differed, and whether that was changed."""

    differences: Differences
    applied: bool


class Saved(msgspec.Struct, frozen=True):
    """The answer of `config save`."""

    file: str
    rules: int
    is_changed: bool
    warnings: tuple[str, ...] = ()  # of ranges that had to be written out


@click.group("config")
def config() -> None:
    """A TOML file of rules and options: check it, compare it with the running relay, apply it, save rules to it."""


def _print_json(answer: msgspec.Struct) -> None:
    tell(msgspec.json.format(msgspec.json.encode(answer)).decode())


def _warn(warnings: tuple[str, ...]) -> None:
    for warning in warnings:
        tell(f"warning: {warning}", err=True)


def _load(file: Path) -> Examined:
    """A file that is right. Raises ConfigError with all that is wrong, a line each."""
    examined = examine(read_text(file), str(file))
    check_together(examined)
    if examined.findings:
        raise ConfigError("\nmcrctl: ".join(map(str, examined.findings)))
    return examined


# --- check ----------------------------------------------------------------------------------------


@config.command("check")
@file_argument
@json_option
@reports_errors
def check(file: Path, as_json: bool) -> None:
    """Check FILE, without a relay: every error with its line. Exit status 0 when there is none, else 1."""
    examined = examine(read_text(file), str(file))
    check_together(examined)
    rules, errors = examined.rules, examined.findings
    interfaces = examined.options.get("interfaces", ())
    warnings = () if errors else tuple(chain_warnings(rules, {rule.rule_id: rule for rule in rules}, interfaces))
    if as_json:
        _print_json(Checked(not errors, len(rules), tuple(errors), warnings))
    for error in () if as_json else errors:
        click.echo(str(error))
    _warn(warnings)
    if errors:
        sys.exit(ExitCode.FAILURE)
    if not as_json:
        click.echo(f"ok: {counted(len(rules), 'rule')}")


# --- diff -----------------------------------------------------------------------------------------


def running_rules(client: Client) -> tuple[Rule, ...]:
    """The rules of the relay."""
    listed = client.ask(api.ListRules()).result
    fields = Rule.__struct_fields__
    return msgspec.convert([{name: rule[name] for name in fields} for rule in listed], tuple[Rule, ...])


def started_with(client: Client) -> api.StartedWith:
    """Its options, and where they come from."""
    return msgspec.convert(client.ask(api.GetOptions()).result, api.StartedWith)


def find_differences(running: tuple[Rule, ...], started: api.StartedWith, examined: Examined) -> Differences:
    """What is other in a file. One without options is one of rules: nothing is said of its options then."""
    options = examined.options
    settings = compare_options(started.options, options, started.command_line) if options else ()
    return compare(running, examined.rules, settings)


def _lines(differences: Differences) -> Iterator[str]:
    yield from (f"- rule {rule.rule_id}: {_whole(rule)}" for rule in differences.removed)
    yield from (f"+ rule {rule.rule_id}: {_whole(rule)}" for rule in differences.added)
    for rule in differences.changed:
        yield f"~ rule {rule.rule_id}"
        yield from (f"    {_field_line(change)}" for change in rule.fields)
    for setting in differences.settings:
        yield f"! {setting.name}: {_word(setting.running)} -> {_word(setting.file)}, after a restart"


def _whole(rule: Rule) -> str:
    """All that a rule says, in a line."""
    interface = f" on {rule.input_interface}" if rule.input_interface else ""
    source = f" from {rule.source}" if rule.source else ""
    outputs = ", ".join(output_name(output) + _extras(msgspec.to_builtins(output)) for output in rule.outputs)
    preserving = ", source preserved" if rule.preserve_source else ""
    stall = f", stalled after {rule.stall_ms} ms" if rule.stall_ms else ""
    second = f" and {legs(rule)[1]}, {rule.protection}" if rule.secondary else ""
    limits = f", at most {limits_of(rule)}" if limits_of(rule) else ""
    return f"{rule.input_group}:{rule.input_port}{interface}{source}{second} -> {outputs}{preserving}{stall}{limits}"


def _extras(output: dict[str, Any]) -> str:
    return "".join(f" {name} {output[name]}" for name in ("ttl", "dscp") if output[name] is not None)


def _field_line(change: FieldChange) -> str:
    if change.field.startswith("outputs[") and change.field.endswith("]"):
        side, output = ("-", change.running) if change.file is None else ("+", change.file)
        return f"{side} output {change.field[len('outputs[') : -1]}{_extras(output)}"
    return f"{change.field}: {_word(change.running)} -> {_word(change.file)}"


def _word(value: Any) -> str:
    return "none" if value is None else msgspec.json.encode(value).decode()


def _summary(differences: Differences) -> str:
    if differences.of_rules == 0:
        rules = "the rules are the same"
    else:
        counts = {"added": differences.added, "removed": differences.removed, "changed": differences.changed}
        rules = "rules: " + ", ".join(f"{len(those)} {word}" for word, those in counts.items())
    count = len(differences.settings)
    return f"{rules}; options that take effect at a restart: {count}" if count else rules


def _show(differences: Differences) -> None:
    for line in (*_lines(differences), _summary(differences)):
        tell(line)


@config.command("diff")
@file_argument
@json_option
@functools.partial(reports_errors, exit_code=DIFF_FAILED)
def diff(file: Path, as_json: bool) -> None:
    """What is other in FILE than in the running relay. Exit status 0: nothing, 1: something, 2: an error."""
    examined = _load(file)
    with Client(click.get_current_context().obj, on_silence=tell_silence) as client:
        differences = find_differences(running_rules(client), started_with(client), examined)
    if as_json:
        _print_json(differences)
    else:
        _show(differences)
    sys.exit(1 if differences.of_rules or differences.settings else 0)


# --- apply ----------------------------------------------------------------------------------------


@config.command("apply")
@file_argument
@click.option("--dry-run", is_flag=True, help="Show what would change, and what the relay would refuse.")
@click.option("--yes", is_flag=True, help="Do not ask before.")
@json_option
@reports_errors
def apply(file: Path, dry_run: bool, yes: bool, as_json: bool) -> None:
    """Make the relay's rules those of FILE: what differs is changed at once or not at all, other streams go on.

    Options that differ are shown; they take effect at a restart. Exit status 0: the rules are those of FILE, whoever
    reads what is printed.
    """
    if as_json and not (yes or dry_run):
        raise UsageError("nobody is asked with --json: give --yes, too, or --dry-run")
    examined = _load(file)
    with Client(click.get_current_context().obj, on_silence=tell_silence) as client:
        running, started = running_rules(client), started_with(client)
        differences = find_differences(running, started, examined)
        if not as_json:
            _show(differences)
        change = change_to(differences, running, examined, is_configuration=_is_same_file(file, started.file))
        is_wanted = not dry_run and (yes or not differences.of_rules or _agreed())
        answer = client.ask(change if is_wanted else msgspec.structs.replace(change, check_only=True))
    _warn(answer.warnings)
    if as_json:
        _print_json(Applied(differences, is_wanted))
    elif is_wanted and differences.of_rules:
        tell("applied")
    if started.file is not None and is_wanted and not change.is_configuration:
        tell(f"mcrctl: note: the relay reads {started.file} at SIGHUP and at a restart, not {file}", err=True)


def change_to(
    differences: Differences, running: tuple[Rule, ...], examined: Examined, is_configuration: bool
) -> api.ChangeRules:
    """The request that makes the running rules those of the file, unless they are others by then."""
    changed = {change.rule_id for change in differences.changed}
    return api.ChangeRules(
        add=(*differences.added, *(rule for rule in examined.rules if rule.rule_id in changed)),
        remove=tuple(rule.rule_id for rule in differences.removed),
        based_on=fingerprint(running),
        is_configuration=is_configuration,
    )


def _is_same_file(file: Path, other: str | None) -> bool:
    try:
        return other is not None and file.samefile(other)
    except OSError:
        return False


def _agreed() -> bool:
    """Ask. Raises ConfigError when there is nobody to ask, or who was asked says no."""
    if not sys.stdin.isatty():
        raise ConfigError("nobody can be asked here: give --yes, or --dry-run to see what would change")
    if not click.confirm("apply this?", err=True):
        raise ConfigError("nothing was changed")
    return True


# --- save -----------------------------------------------------------------------------------------


@config.command("save")
@file_argument
@json_option
@reports_errors
def save(file: Path, as_json: bool) -> None:
    """Write the relay's rules to FILE. One that exists keeps its options, comments and order.

    A range of which a rule has changed or is gone is written out, an entry a rule, with a warning.
    """
    from relay.saving import replace_file, updated  # tomlkit is slow to load

    with Client(click.get_current_context().obj, on_silence=tell_silence) as client:
        rules = running_rules(client)
    former = read_text(file) if file.exists() else None
    warnings: list[str] = []
    text = updated(former or "", str(file), rules, warnings.append)
    if text != former:
        replace_file(file, text)
    _warn(tuple(warnings))
    if as_json:
        _print_json(Saved(str(file), len(rules), text != former, tuple(warnings)))
    else:
        saved = f"{counted(len(rules), 'rule')} saved to {file}"
        tell(saved if text != former else f"{file} has these rules already")
