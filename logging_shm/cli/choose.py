"""Which rings a command is about, and what is said of those that can't be shown. Imports nothing slow to load."""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import click
import posix_ipc

from logging_shm.facility import FACILITIES
from logging_shm.layout import CORE_NONE
from logging_shm.ring import SharedSPSCRingBuffer
from logging_shm.segment import SHM_DIRECTORY, SegmentError, is_remnant, names

_WORDS = "|".join(FACILITIES)
NO_INSTANCE = re.compile(rf"mcr_(supervisor|controlplane|dp_c\d+_({_WORDS}|stats))")
RING = re.compile(rf"mcr_(.+_)?({_WORDS})")
STATS = "_stats"  # counters of a relay's worker: no log


def fail(message: str) -> NoReturn:
    """End with one line and status 1."""
    click.echo(f"mcrlog: {message}", err=True)
    sys.exit(1)


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that choose rings: instance, facility, core."""
    for option in (
        click.option("--core", type=click.IntRange(0, CORE_NONE - 1), metavar="N", help="Only this core's rings."),
        click.option(
            "--facility",
            type=click.Choice(list(FACILITIES), case_sensitive=False),
            metavar="NAME",
            help=f"Only this one's: {', '.join(FACILITIES)}.",
        ),
        click.option("--instance", metavar="NAME", help="Only the rings of the relay of this name. [default: of all]"),
    ):
        command = option(command)
    return command


def is_of(name: str, instance: str | None) -> bool:
    """Whether a segment's name is one of this instance's; without an instance, every name is."""
    if instance is None:
        return True
    # mcr_dp_c0_ingress is of the relay that has no name, not of one called dp.
    return name.startswith(f"mcr_{instance}_") and not NO_INSTANCE.fullmatch(name)


class Rings:
    """The rings that are meant, and why others are not shown."""

    def __init__(
        self,
        segments: Sequence[str] = (),
        instance: str | None = None,
        facility: str | None = None,
        core: int | None = None,
    ) -> None:
        """Those given by name must be there: fails when one is not."""
        self._given = [name.removeprefix(f"{SHM_DIRECTORY}/") for name in segments]
        self._instance = instance
        self._facility = None if facility is None else FACILITIES[facility]
        self._core = core
        self.unreadable: list[str] = []  # what is wrong with each
        self.forbidden: dict[str, int] = {}  # how many there are of each user
        for name in self._given:
            try:
                SharedSPSCRingBuffer.attach(name, header_only=True)
            except SegmentError as error:
                fail(f"{error}: {'run as its owner or as root' if is_forbidden(error) else '`mcrlog list` shows all'}")

    def now(self, header_only: bool = False) -> Iterator[SharedSPSCRingBuffer]:
        """Those that there are now; with `header_only` as who is not prepared for a truncated one reads them."""
        self.unreadable, self.forbidden = [], {}
        for name in self._given or names():
            if not is_of(name, self._instance):
                continue
            try:
                ring = SharedSPSCRingBuffer.attach(name, header_only=header_only)
            except SegmentError as error:
                self._note(name, error)
                continue
            if self._facility in (None, ring.facility) and self._core in (None, ring.core):
                yield ring

    def _note(self, name: str, error: SegmentError) -> None:
        try:
            path = SHM_DIRECTORY / name
            uid = path.lstat().st_uid
        except FileNotFoundError:
            return
        if name.endswith(STATS):
            return
        if is_forbidden(error):
            self.forbidden[user_of(uid)] = self.forbidden.get(user_of(uid), 0) + 1
        elif is_remnant(name, uid):
            self.unreadable.append(f"{error}: `mcrlog clean` removes it once nobody uses it")
        elif RING.fullmatch(name):
            self.unreadable.append(f"{error}: a relay that needs this name does not start until it is removed")

    def remarks(self) -> list[str]:
        """What is to be told of those that are not shown."""
        forbidden = [
            f"{count} of {user}'s segments may not be read: run as root" for user, count in self.forbidden.items()
        ]
        return [*forbidden, *(f"not shown: {error}" for error in self.unreadable)]

    def none(self) -> str:
        """Why there are none."""
        if self._given or self._instance is not None or self._facility is not None or self._core is not None:
            return "; ".join([*self.remarks(), "no log ring is like that: `mcrlog list` without options shows all"])
        return "; ".join(self.remarks()) or f"no log rings in {SHM_DIRECTORY}: is a relay running?"


def is_forbidden(error: SegmentError) -> bool:
    """Whether a segment could not be opened for want of permission."""
    return isinstance(error.__cause__, posix_ipc.PermissionsError)


def user_of(uid: int) -> str:
    """A user's name, or the number where there is none."""
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"
