"""Schemas: every command with --json has one, and they are schemas."""

import json
from collections.abc import Iterator

import click
from click.testing import CliRunner
from jsonschema import Draft202012Validator

from relay.cli.mcrctl import main
from relay.schema import ANSWERS, VERSION, of_answer


def with_json(group: click.Group, words: tuple[str, ...] = ()) -> Iterator[str]:
    """The words of every command that has --json."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from with_json(command, (*words, name))
        elif any("--json" in option.opts for option in command.params):
            yield " ".join((*words, name))


def test_every_command_with_json_has_a_schema() -> None:
    assert set(with_json(main)) == set(ANSWERS), "add the type of its answer to relay/schema.py"


def test_the_command_prints_the_whole_with_its_version() -> None:
    document = json.loads(CliRunner().invoke(main, ["schema"]).stdout)
    assert document["version"] == VERSION
    assert set(document["answers"]) == set(ANSWERS)
    Draft202012Validator.check_schema(document)


def test_each_schema_is_complete_in_itself() -> None:
    for command in ANSWERS:
        Draft202012Validator.check_schema(of_answer(command))
        Draft202012Validator(of_answer(command)).is_valid({})  # raises for a reference that leads nowhere
