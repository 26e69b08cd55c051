"""What differs between the rules and options that a relay runs with and those of a file. Pure.

compare(running, wanted) → Differences(added, removed, changed), of rules by their ids, field by field
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import msgspec

from relay.config import Options
from relay.rules import Output, Rule, Secondary, output_name


class FieldChange(msgspec.Struct, frozen=True):
    """A field that differs; one side is None where an output is on the other alone."""

    field: str  # such as `input_port`, or `outputs[239.2.2.2:6001:eth1].ttl`
    running: Any
    file: Any


class RuleChange(msgspec.Struct, frozen=True):
    """A rule that both have, with other content."""

    rule_id: str
    fields: tuple[FieldChange, ...]


class Setting(msgspec.Struct, frozen=True):
    """An option that would be another after a restart with the file."""

    name: str
    running: Any
    file: Any


class Differences(msgspec.Struct, frozen=True):
    """What a file has other than the relay. `added` is in the file alone, `removed` in the relay alone."""

    added: tuple[Rule, ...] = ()
    removed: tuple[Rule, ...] = ()
    changed: tuple[RuleChange, ...] = ()
    settings: tuple[Setting, ...] = ()

    @property
    def of_rules(self) -> int:
        """How many rules differ."""
        return len(self.added) + len(self.removed) + len(self.changed)


def compare(running: Iterable[Rule], wanted: Iterable[Rule], settings: Iterable[Setting] = ()) -> Differences:
    """Compare two sets of rules, each in its own order."""
    before = {rule.rule_id: rule for rule in running}
    after = {rule.rule_id: rule for rule in wanted}
    return Differences(
        added=tuple(rule for rule_id, rule in after.items() if rule_id not in before),
        removed=tuple(rule for rule_id, rule in before.items() if rule_id not in after),
        changed=tuple(
            RuleChange(rule_id, tuple(_fields(before[rule_id], rule)))
            for rule_id, rule in after.items()
            if rule_id in before and before[rule_id] != rule
        ),
        settings=tuple(settings),
    )


def _fields(before: Rule, after: Rule) -> Iterator[FieldChange]:
    for name in Rule.__struct_fields__:
        if name == "outputs":
            yield from _outputs(before.outputs, after.outputs)
        elif getattr(before, name) != getattr(after, name):
            yield FieldChange(name, _plain(getattr(before, name)), _plain(getattr(after, name)))


def _plain(value: Any) -> Any:
    """The value of a field; of a secondary input, what it gives."""
    if not isinstance(value, Secondary):
        return value
    return {name: given for name, given in msgspec.to_builtins(value).items() if given is not None}


def _outputs(before: Collection[Output], after: Collection[Output]) -> Iterator[FieldChange]:
    """Outputs that came, went, or differ; or their order, when that is all."""
    running = {output_name(output): output for output in before}
    wanted = {output_name(output): output for output in after}
    for name, output in running.items():
        if name not in wanted:
            yield FieldChange(f"outputs[{name}]", msgspec.to_builtins(output), None)
    for name, output in wanted.items():
        former = running.get(name)
        if former is None:
            yield FieldChange(f"outputs[{name}]", None, msgspec.to_builtins(output))
            continue
        for field in ("ttl", "dscp"):
            if getattr(former, field) != getattr(output, field):
                yield FieldChange(f"outputs[{name}].{field}", getattr(former, field), getattr(output, field))
    if set(running) == set(wanted) and list(running) != list(wanted):
        yield FieldChange("outputs", list(running), list(wanted))


def compare_options(
    running: Mapping[str, Any], of_file: Mapping[str, Any], command_line: Collection[str]
) -> Iterator[Setting]:
    """What would be other after a restart with the file: options of the command line stay as they are."""
    options = Options(**of_file)
    for name in Options.__struct_fields__:
        wanted = msgspec.to_builtins(getattr(options, name))
        wanted = list(wanted) if isinstance(wanted, tuple) else wanted
        if name not in command_line and name in running and running[name] != wanted:
            yield Setting(name, running[name], wanted)
