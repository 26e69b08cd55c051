"""The control socket: bound by the supervisor where clients look for it, served by the control plane."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from logging_shm import Logger
from relay.errors import PreflightError

SOCKET_MODE = 0o666  # who may do what is decided by SO_PEERCRED
SOCKET_MODE_OF_GROUP = 0o660  # whoever names a group means it and nobody else
BACKLOG = 1024  # clients that flood fill it; the others wait behind them


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
    return True


@contextlib.contextmanager
def listening(path: Path, log: Logger, mode: str | None = None, gid: int | None = None) -> Iterator[socket.socket]:
    """A listening socket at `path`, which is removed at the end. `mode` is octal, `gid` the group that owns it.

    What a killed supervisor left there is replaced. Raises PreflightError when it is in use or can't be made.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_socket() and not _answers(path):
                path.unlink()
                log.notice(f"Removed the control socket {path} of a killed supervisor")
            listener.bind(str(path))
            if gid is not None:
                os.chown(path, -1, gid)
            path.chmod(int(mode, 8) if mode else SOCKET_MODE if gid is None else SOCKET_MODE_OF_GROUP)
            listener.listen(BACKLOG)
        except OSError as error:
            raise PreflightError(
                f"control socket {path}: {error.strerror}: stop the relay that uses it, or give --socket"
            ) from error
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)
