"""Manual pages and shell completions from the commands themselves: `make man`, into packaging/share.

What stands in a page is what `--help` says: options, their defaults, commands, examples. Only exit statuses, files and
references are written down here.

    packaging/share/man/man1/mcrctl.1  …/bash-completion/completions/mcrctl  …/zsh/site-functions/_mcrctl  …
"""

import importlib
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import click

from relay.cli.completion import PROGRAMS, SHELLS, script
from relay.version import VERSION

SHARE = Path(__file__).resolve().parents[1] / "packaging" / "share"
COMPLETIONS = {
    "bash": "bash-completion/completions/{}",
    "zsh": "zsh/site-functions/_{}",
    "fish": "fish/vendor_completions.d/{}.fish",
}
USAGE = (2, "The command line is wrong.")


@dataclass(frozen=True)
class Page:
    """What a page has beside the command's own help."""

    section: int
    summary: str
    statuses: tuple[tuple[int, str], ...]
    files: tuple[tuple[str, str], ...]


PAGES = {
    "mcrd": Page(
        8,
        "relay multicast between networks that can not route it",
        (
            (0, "It was told to end, or --check found nothing wrong."),
            (1, "Configuration, privileges or the machine do not allow it; or a process that it needs did not start."),
            USAGE,
        ),
        (
            ("/etc/mcr/relay.toml", "Options and rules, where systemd starts it."),
            ("/run/mcr/control.sock", "The control socket; NAME.sock of an instance."),
            ("/dev/shm/mcr_*", "Log rings and counters, while it runs."),
        ),
    ),
    "mcrctl": Page(
        1,
        "control a running multicast relay",
        (
            (0, "Done."),
            (1, "The relay refused, and has changed nothing; or a file or a value is not valid."),
            USAGE,
            (3, "No relay answers on the control socket."),
        ),
        (("/run/mcr/control.sock", "The control socket; NAME.sock of an instance."),),
    ),
    "mcrlog": Page(
        1,
        "look at the log rings of a multicast relay",
        ((0, "Done."), (1, "There is nothing to look at, or something can not be read or removed."), USAGE),
        (("/dev/shm/mcr_*", "The rings."),),
    ),
}


def escape(text: str) -> str:
    """Text for roff: no character of it is a request."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^([.'])", r"\\&\1", text, flags=re.MULTILINE)


def prose(text: str) -> list[str]:
    """A help text as paragraphs; those that begin with \\b keep their lines."""
    lines: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        if paragraph.startswith("\b"):
            body = [escape(line) for line in paragraph.removeprefix("\b").strip("\n").splitlines()]
            lines += [".PP", ".nf", *body, ".fi"]
        else:
            lines += [".PP", escape(" ".join(paragraph.split()))]
    return lines[1:] if lines[:1] == [".PP"] else lines


def options(context: click.Context) -> list[str]:
    """The options of a command, as --help lists them."""
    lines = []
    for parameter in context.command.params:
        record = parameter.get_help_record(context) if isinstance(parameter, click.Option) else None
        if record is not None:
            declaration, text = record
            tag = rf"\fB{escape(declaration)}\fR"
            lines += [".TP", tag, escape(" ".join(text.split()))] if text else [".PP", tag]
    return lines


def commands(context: click.Context) -> list[str]:
    """The subcommands of a group, and theirs."""
    lines: list[str] = []
    assert isinstance(context.command, click.Group)
    for name in context.command.list_commands(context):
        command = context.command.get_command(context, name)
        assert command is not None
        inner = click.Context(command, info_name=name, parent=context)
        if isinstance(command, click.Group):
            lines += commands(inner)
            continue
        usage = " ".join(command.collect_usage_pieces(inner))
        path = inner.command_path.split(" ", 1)[1]
        lines += [f".SS {escape(path)} {escape(usage)}", *prose(command.help or ""), *options(inner)]
        lines += [".PP", *prose(command.epilog)] if command.epilog else []
    return lines


def today() -> str:
    """The date of the pages, which whoever builds packages can fix (https://reproducible-builds.org)."""
    return time.strftime("%Y-%m-%d", time.gmtime(float(os.environ.get("SOURCE_DATE_EPOCH", time.time()))))


def page(name: str) -> str:
    """The manual page of a program, in the man macros."""
    about = PAGES[name]
    module, _, attribute = PROGRAMS[name].partition(":")
    command: click.Command = getattr(importlib.import_module(module), attribute)
    context = click.Context(command, info_name=name)
    lines = [
        f'.TH {name.upper()} {about.section} "{today()}" "MCR {VERSION}" "Multicast relay"',
        *(".SH NAME", rf"{name} \- {about.summary}"),
        *(".SH SYNOPSIS", rf"\fB{name}\fR {escape(' '.join(command.collect_usage_pieces(context)))}"),
        *(".SH DESCRIPTION", *prose(command.help or "")),
        *(".SH OPTIONS", *options(context)),
    ]
    if isinstance(command, click.Group):
        lines += [".SH COMMANDS", *commands(context)]
    lines.append(".SH EXIT STATUS")
    for status, text in about.statuses:
        lines += [".TP", rf"\fB{status}\fR", escape(text)]
    lines.append(".SH FILES")
    for path, text in about.files:
        lines += [".TP", rf"\fI{escape(path)}\fR", escape(text)]
    lines += [
        ".SH ENVIRONMENT",
        ".TP",
        r"\fBNO_COLOR\fR",
        "Set to anything: no colours. Where the output is no terminal there are none.",
    ]
    if command.epilog:
        lines += [".SH EXAMPLES", *prose(command.epilog)]
    others = [f"\\fB{other}\\fR({PAGES[other].section})" for other in PAGES if other != name]
    return "\n".join([*lines, ".SH SEE ALSO", ", ".join(others), ""])


def main() -> None:
    """Write every page and every completion."""
    share = Path(sys.argv[1]) if len(sys.argv) > 1 else SHARE
    for name in PROGRAMS:
        section = PAGES[name].section
        files = {f"man/man{section}/{name}.{section}": page(name)}
        files |= {COMPLETIONS[shell].format(name): script(shell, name) for shell in SHELLS}
        for path, text in files.items():
            (share / path).parent.mkdir(parents=True, exist_ok=True)
            (share / path).write_text(text)


if __name__ == "__main__":
    main()
