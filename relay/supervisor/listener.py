"""The control socket: bound by the supervisor where clients look for it, served by the control plane."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from logging_shm import Logger
from relay.errors import PreflightError

SOCKET_MODE = 0o666  # who may do what is decided by SO_PEERCRED
SOCKET_MODE_OF_GROUP = 0o660  # whoever names a group means it and nobody else
BACKLOG = 1024  # clients that flood fill it; the others wait behind them
END_S_MAX = 1.0
POLL_S = 0.02


def _is_served(path: Path) -> bool:
    """Whether somebody listens there. What a killed supervisor left behind may take a moment to end."""
    deadline_s = time.monotonic() + END_S_MAX
    while _answers(path):
        if time.monotonic() > deadline_s:
            return True
        time.sleep(POLL_S)
    return False


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
    return True


@contextlib.contextmanager
def listening(
    path: Path, log: Logger, mode: str | None = None, gid: int | None = None, adopted: socket.socket | None = None
) -> Iterator[socket.socket]:
    """A listening socket at `path`, which is removed at the end. `mode` is octal, `gid` the group that owns it.

    A former supervisor's is `adopted`: clients that wait there are answered. It stays there for the next start when
    this one fails. What a killed one left without anybody
    behind it is replaced. Raises PreflightError when it is in use or can't be made.
    """
    with adopted or socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            if adopted is None:
                _bind(listener, path, log)
            if gid is not None and path.stat().st_gid != gid:  # a service may be forbidden to change owners
                os.chown(path, -1, gid)
            path.chmod(int(mode, 8) if mode else SOCKET_MODE if gid is None else SOCKET_MODE_OF_GROUP)
            listener.listen(BACKLOG)
        except OSError as error:
            raise PreflightError(
                f"control socket {path}: {error.strerror}: stop the relay that uses it, or give --socket"
            ) from error
        try:
            yield listener
        except BaseException:
            if adopted is None:
                path.unlink(missing_ok=True)
            raise
        path.unlink(missing_ok=True)


def _bind(listener: socket.socket, path: Path, log: Logger) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_socket() and not _is_served(path):
        path.unlink()
        log.notice(f"Removed the control socket {path} of a killed supervisor")
    listener.bind(str(path))
