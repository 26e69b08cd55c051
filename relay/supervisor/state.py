"""The state file: the rules that are active, so that those added at run time outlive the supervisor.

Written by the supervisor when a change ends, before its client is answered: whole, beside the former one, synced, and
renamed over it. Read once, at start. JSON, for whoever must look into it; rules are checked again when they are read.
"""

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from relay.errors import PreflightError, RelayError
from relay.rules import Rule, validate

VERSION = 1
FILE_MODE = 0o600
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
UNFINISHED = ".unfinished"
DAMAGED = ".damaged"
REMEDY = "give --state a file in an existing directory of the relay's own"

Document = TypeVar("Document", bound=msgspec.Struct)


class State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is kept. `configured` are the ids of rules that the configuration file put there.

    `carried_out` are ids of clients' changes that must not be made a second time.
    """

    version: int
    rules: tuple[Rule, ...] = ()
    configured: tuple[str, ...] = ()
    carried_out: tuple[str, ...] = ()


def check(state: State) -> None:
    """Raises RelayError for what can't have been written here."""
    if state.version != VERSION:
        raise RelayError(f"version {state.version}, expected {VERSION}")
    for rule in state.rules:
        validate(rule)


class StateFile(Generic[Document]):
    """A document in a file of the supervisor's own."""

    def __init__(self, path: Path, kind: type[Document], check: Callable[[Document], None], remedy: str) -> None:
        """`remedy` says what to do when it can't be written."""
        self.path = path
        self._remedy = remedy
        self._decoder = msgspec.json.Decoder(kind)
        self._check = check
        self._unfinished = path.with_name(path.name + UNFINISHED)

    def prepare(self) -> list[str]:
        """Make sure that the file can be written; return a line about what a killed supervisor left half-written.

        Raises PreflightError.
        """
        lines = []
        try:
            if self._unfinished.exists() or self._unfinished.is_symlink():
                self._unfinished.unlink()
                lines.append(f"Removed the half-written {self._unfinished} of a killed supervisor")
            os.close(self._create())
            self._unfinished.unlink()
        except OSError as error:
            raise PreflightError(f"state file {self.path}: {error.strerror}: {self._remedy}") from error
        return lines

    def _create(self) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(self._unfinished, flags, FILE_MODE)

    def load(self) -> tuple[Document | None, list[str]]:
        """The document, None without a file; and a line when the file was damaged, which is set aside then."""
        try:
            content = self._read()
        except FileNotFoundError:
            return None, []
        except OSError as error:
            raise PreflightError(f"state file {self.path}: {error.strerror}: make it readable, or remove it") from error
        try:
            document = self._decoder.decode(content)
            self._check(document)
        except (msgspec.MsgspecError, RelayError) as error:
            aside = self.path.with_name(self.path.name + DAMAGED)
            self.path.replace(aside)
            return None, [f"State file {self.path} is damaged and was set aside as {aside}: {error}"]
        return document, []

    def _read(self) -> bytes:
        """The content, which nobody else can have written. Raises OSError, PreflightError."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # nothing waits where a pipe has the name
        descriptor = os.open(self.path, flags)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise PreflightError(f"state file {self.path}: no regular file: remove it")
            if status.st_uid not in (0, os.geteuid()) or status.st_mode & OTHERS_WRITE:
                raise PreflightError(
                    f"state file {self.path}: others could have written it: remove it, or `chown` and `chmod go-w` it"
                )
            return file.read()

    def save(self, document: Document) -> None:
        """Replace the file at once. Raises RelayError; the former one stands then."""
        content = msgspec.json.format(msgspec.json.encode(document))
        try:
            with contextlib.suppress(FileNotFoundError):
                self._unfinished.unlink()
            with os.fdopen(self._create(), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            self._unfinished.replace(self.path)
        except OSError as error:
            raise RelayError(f"state file {self.path} not written: {error.strerror}: the former one stands") from error

    def remove(self) -> None:
        """Remove the file, at a clean stop, when nobody asked for it."""
        self.path.unlink(missing_ok=True)
        self._unfinished.unlink(missing_ok=True)


def check_state_place(path: str | None) -> None:
    """Raises PreflightError when a state file could not be written there. Touches nothing."""
    if path is not None and not os.access(Path(path).parent, os.W_OK | os.X_OK):
        raise PreflightError(f"state file {path}: its directory can't be written to: {REMEDY}")


def state_file(path: Path | None, control_socket: Path) -> StateFile[State]:
    """Where rules are kept: in `path` for good, or beside the control socket until a clean stop."""
    if path is not None:
        return StateFile(path, State, check, REMEDY)
    return StateFile(control_socket.with_suffix(".state"), State, check, "give --socket another place")
