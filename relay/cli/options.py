"""What commands of mcrctl share: --json, and how an error is told."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import click

from relay.errors import RelayError

Command = Callable[..., None]

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def tell_silence(line: str) -> None:
    """Say on stderr what a command waits for: the `on_silence` of its Client."""
    click.echo(f"mcrctl: {line}", err=True)


def reports_errors(command: Command, exit_code: int | None = None) -> Command:
    """One line on stderr for an error, and `exit_code` or the error's own."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except RelayError as error:
            click.echo(f"mcrctl: {error}", err=True)
            sys.exit(error.exit_code if exit_code is None else exit_code)

    return wrapper
