"""Completion for shells, as click makes it: the scripts, and what the relay knows of names."""

import contextlib

import click
from click.shell_completion import get_completion_class

from relay.client import Client
from relay.config import socket_path
from relay.errors import RelayError

PROGRAMS = {
    "mcrd": "relay.cli.mcrd:main",
    "mcrctl": "relay.cli.mcrctl:main",
    "mcrlog": "logging_shm.cli.main:main",
}
SHELLS = ("bash", "zsh", "fish")
ASK_S_MAX = 1.0  # somebody waits at a prompt


def script(shell: str, program: str) -> str:
    """The script that a shell loads to complete the arguments of a program."""
    kind = get_completion_class(shell)
    assert kind is not None
    # The program itself is asked for words at each completion: here its name counts alone.
    completion = kind(click.Command(program), {}, program, f"_{program.upper()}_COMPLETE")
    return completion.source_template % completion.source_vars() + "\n"


def rule_ids(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """The active rules' ids, or nothing when no relay answers."""
    given = context.find_root().params
    with (
        contextlib.suppress(RelayError, OSError),
        Client(socket_path(given.get("socket"), given.get("instance")), ASK_S_MAX) as client,
    ):
        return [rule.rule_id for rule in client.rules() if rule.rule_id.startswith(incomplete)]
    return []
