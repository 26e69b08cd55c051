"""Which rings a command is about. Shared by all; imports nothing that is slow to load."""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import click

from logging_shm.facility import Facility
from logging_shm.ring import SharedSPSCRingBuffer
from logging_shm.segment import SHM_DIRECTORY, SegmentError, names

FACILITIES = {facility.name.lower(): facility for facility in Facility}


def fail(message: str) -> NoReturn:
    """End with one line and status 1."""
    click.echo(f"mcrlog: {message}", err=True)
    sys.exit(1)


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that choose rings: instance, facility, core."""
    for option in (
        click.option("--core", type=click.IntRange(0), help="Only this core's rings."),
        click.option("--facility", type=click.Choice(list(FACILITIES), case_sensitive=False), help="Only this one's."),
        click.option("--instance", metavar="NAME", help="Only this relay's rings."),
    ):
        command = option(command)
    return command


def rings(
    segments: Sequence[str] = (), instance: str | None = None, facility: str | None = None, core: int | None = None
) -> Iterator[SharedSPSCRingBuffer]:
    """The log rings of this host that may be read and are meant; other shared memory is passed over.

    Those given by name must be there: fails when one is not.
    """
    prefix = f"mcr_{instance}_" if instance else "mcr_"
    for name in segments or names():
        plain = name.removeprefix(f"{SHM_DIRECTORY}/")
        try:
            ring = SharedSPSCRingBuffer.attach(plain)
        except SegmentError as error:
            if segments:
                fail(f"{error}: `mcrlog list` shows the rings there are")
            continue
        is_meant = (
            plain.startswith(prefix)
            and (facility is None or ring.facility is FACILITIES[facility.lower()])
            and (core is None or ring.core == core)
        )
        if is_meant:
            yield ring
