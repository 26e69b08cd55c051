"""What commands that change something say: it never decides what they do, nor how they end.

The reader of a pipe may be gone (`mcrctl config apply FILE | head`), a disk may be full. What was asked for is done all
the same, and the exit code tells of that alone.
"""

import contextlib
import errno
import os
import sys

import click


def tell(text: str, err: bool = False) -> None:
    """Print a line on standard output, or on standard error, as long as that takes any."""
    try:
        click.echo(text, err=err)
    except OSError as error:
        _silence(2 if err else 1)
        if not err and error.errno != errno.EPIPE:
            tell(f"mcrctl: standard output: {error.strerror}: not all that was done could be told", err=True)


def _silence(descriptor: int) -> None:
    """Let what is still to be told go nowhere, also what the interpreter holds and writes at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
    with contextlib.suppress(OSError):
        (sys.stderr if descriptor == 2 else sys.stdout).flush()
