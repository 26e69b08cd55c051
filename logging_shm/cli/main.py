"""The command `mcrlog`: its subcommands are imported when they are called, so that each starts as fast as it can."""

import importlib

import click

COMMANDS = {"list": "list_rings", "tail": "tail", "dump": "dump", "stat": "stat", "clean": "clean"}


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


@click.command(cls=Commands, epilog="Example: mcrlog tail -f --facility Ingress --severity warning")
def main() -> None:
    """Look at the log rings in /dev/shm: list, follow, dump, measure, clean up."""
