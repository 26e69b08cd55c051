"""mcrctl schema: what commands answer with --json, for programs that read it."""

import click
import msgspec


@click.command("schema")
def schema() -> None:
    """The JSON schema of all answers with --json, and of requests to the control socket."""
    from relay.schema import document  # takes its time, and only this command needs it

    click.echo(msgspec.json.format(msgspec.json.encode(document())).decode())
