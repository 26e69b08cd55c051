"""The command `mcrlog`: its subcommands are imported when they are called, so that each starts as fast as it can."""

import contextlib
import importlib
from collections.abc import Iterator
from typing import IO, Any

import click

COMMANDS = {"list": "list_rings", "tail": "tail", "dump": "dump", "stat": "stat", "clean": "clean"}
EPILOG = """\b
Examples:
  mcrlog list
  mcrlog tail -f --facility ingress --severity warning
  mcrlog dump --instance tv > last-words.txt

Whatever is read here stays in the ring: the relay's own log loses nothing, and any number may watch. It works
with no relay running, and on a dead one's rings. The rings of a relay may be read by root, and by the user that
it runs as.
"""


class OneLineError(click.ClickException):
    """A wrong command line, told in one line."""

    exit_code = 2

    def show(self, file: IO[Any] | None = None) -> None:
        """Print it as all errors of mcrlog are."""
        click.echo(f"mcrlog: {self.message}", err=True, file=file)


@contextlib.contextmanager
def in_one_line() -> Iterator[None]:
    """Replace click's usage errors, which take four lines."""
    try:
        yield
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "mcrlog"
        raise OneLineError(f"{error.format_message().rstrip('.')}: see `{path} --help`") from None


class Commands(click.Group):
    """Subcommands, one module each."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which one needs them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, or None for a word that is none."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"logging_shm.cli.{COMMANDS[cmd_name]}").command
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Without arguments, show the help."""
        with in_one_line():
            return super().parse_args(ctx, args or ["--help"])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand."""
        with in_one_line():
            return super().invoke(ctx)


@click.command(cls=Commands, epilog=EPILOG)
@click.version_option(package_name="mcr", prog_name="mcrlog", message="%(prog)s, version %(version)s")
def main() -> None:
    """Look at the log rings in /dev/shm: list, follow, dump, measure, clean up."""
