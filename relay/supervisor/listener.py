"""The control socket: bound by the supervisor where clients look for it, served by the control plane.

Also the places beside it, where the supervisor keeps files of its own. Nothing here follows a symbolic link, and what
another made is never changed or removed: it is named, and the start is refused.
"""

import contextlib
import os
import pwd
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from logging_shm import Logger
from relay.credentials import peer_of
from relay.errors import PreflightError
from relay.trust import check_place, trusted_uids

SOCKET_MODE = 0o666  # who may do what is decided by SO_PEERCRED
SOCKET_MODE_OF_GROUP = 0o660  # whoever names a group means it and nobody else
SOCKET_MODE_UNFINISHED = 0o600  # until owner and mode are what they should be
DIRECTORY_MODE = 0o755
BACKLOG = 1024  # clients that flood fill it; the others wait behind them
END_S_MAX = 1.0
POLL_S = 0.02
SUPERVISOR = "supervisor"  # how the name of a segment that every mcrd maps ends
OTHER = "stop it, or give --socket another place"


def prepare_place(path: Path) -> None:
    """See that the control socket and what lies beside it can be made at `path`; make the directory.

    Raises PreflightError when another mcrd serves it, by its pid, or when others could change what is there.
    """
    _make_directory(path.absolute().parent)
    check_place(path, trusted_uids(), f"control socket {path}")
    if _is_there(path, f"control socket {path}") and (pid := _supervisor_behind(path)) is not None:
        raise PreflightError(f"control socket {path}: process {pid} serves it: {OTHER}")


def refuse_foreign(path: Path, what: str) -> None:
    """Raises PreflightError unless `path` is free, or a socket that a relay may have left."""
    _is_there(path, what)


def _make_directory(directory: Path) -> None:
    """Like mkdir -p; with a mode that does not depend on the umask, so that no others may write there."""
    for missing in reversed([path for path in (directory, *directory.parents) if not path.exists()]):
        try:
            missing.mkdir(DIRECTORY_MODE, exist_ok=True)
        except OSError as error:
            raise PreflightError(f"directory {missing}: {error.strerror}: give --socket another place") from error


def _is_there(path: Path, what: str) -> bool:
    """Whether a socket of ours is there. Raises PreflightError for what is none."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise PreflightError(f"{what}: {error.strerror}: give --socket another place") from error
    if stat.S_ISLNK(status.st_mode):
        raise PreflightError(f"{what} is a symbolic link: remove it, or give --socket another place")
    if not stat.S_ISSOCK(status.st_mode):
        raise PreflightError(f"{what} exists and is no socket: remove it, or give --socket another place")
    if status.st_uid not in (0, os.geteuid()):
        raise PreflightError(f"{what} belongs to {_user(status.st_uid)}: remove it, or give --socket another place")
    return True


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user id {uid}"


def _supervisor_behind(path: Path) -> int | None:
    """The other mcrd that listens there and lives; what one that was killed left behind is taken over or replaced."""
    pid = _listener_pid(path)
    if not pid or pid == os.getpid():
        return None
    try:  # the pid may have gone to another process since
        mapped = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
    except OSError:
        return None
    is_supervisor = any("/dev/shm/mcr_" in line and line.endswith(SUPERVISOR) for line in mapped)
    return pid if is_supervisor else None


def _listener_pid(path: Path) -> int | None:
    """Who called listen(2) at `path`: 0 when that can't be told, None when nobody listens. Never blocks."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return None
        except OSError:  # EAGAIN where too many wait; EPROTOTYPE, another kind of socket
            return 0
        pid, _, _ = peer_of(probe)
        return pid


@contextlib.contextmanager
def listening(
    path: Path, log: Logger, mode: str | None = None, gid: int | None = None, adopted: socket.socket | None = None
) -> Iterator[socket.socket]:
    """A listening socket at `path`, which is removed at the end. `mode` is octal, `gid` the group that owns it.

    A former supervisor's is `adopted`: clients that wait there are answered. It stays there for the next start when
    this one fails. What a killed one left without anybody behind it is replaced. Raises PreflightError when it is in
    use or can't be made.
    """
    with adopted or socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            if adopted is None:
                _bind(listener, path, log)
            made = _hand_over(path, int(mode, 8) if mode else SOCKET_MODE if gid is None else SOCKET_MODE_OF_GROUP, gid)
            listener.listen(BACKLOG)
        except OSError as error:
            raise PreflightError(
                f"control socket {path}: {error.strerror}: stop the relay that uses it, or give --socket"
            ) from error
        try:
            yield listener
        except BaseException:
            if adopted is None:
                _remove(path, made)
            raise
        _remove(path, made)


def _remove(path: Path, made: tuple[int, int]) -> None:
    """Remove the socket, if the name is still its own."""
    with contextlib.suppress(OSError):
        if _identity(path.lstat()) == made:
            path.unlink()


def _is_served(path: Path) -> bool:
    """Whether somebody listens there. What a killed supervisor left behind may take a moment to end."""
    deadline_s = time.monotonic() + END_S_MAX
    while _listener_pid(path) is not None:
        if time.monotonic() > deadline_s:
            return True
        time.sleep(POLL_S)
    return False


def _bind(listener: socket.socket, path: Path, log: Logger) -> None:
    if _is_there(path, f"control socket {path}") and not _is_served(path):
        path.unlink()
        log.notice(f"Removed the control socket {path} of a killed supervisor")
    os.fchmod(listener.fileno(), SOCKET_MODE_UNFINISHED)  # which bind(2) gives the file, less the umask
    listener.bind(str(path))


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _hand_over(path: Path, mode: int, gid: int | None) -> tuple[int, int]:
    """Give the socket's file its group and mode; return what tells it from another one that has the name later."""
    descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISSOCK(status.st_mode) or status.st_uid != os.geteuid():
            raise PreflightError(f"control socket {path} was replaced by another's file: give --socket another place")
        itself = f"/proc/self/fd/{descriptor}"  # chmod(2) and chown(2) of this very file, whatever has its name
        if gid is not None and status.st_gid != gid:  # a service may be forbidden to change owners
            os.chown(itself, -1, gid)
        Path(itself).chmod(mode)
    finally:
        os.close(descriptor)
    return _identity(status)
