"""Whether a pid that a less privileged process names is what it says: a child of the one that forks, with its user.

The supervisor may be root, and signals go by pid. So a named process is held by a pidfd first, which no other process
can take the place of, looked at then, and signalled through the pidfd alone. man 2 pidfd_open.
"""

import contextlib
import os
import select
import signal

import psutil


class NotKinError(Exception):
    """The process is somebody else's."""


def hold(pid: int, parent_pid: int, uid: int) -> int | None:
    """A pidfd of the process, which the caller closes; None when it has ended and was waited for already.

    Raises NotKinError unless its parent is `parent_pid` and its real user `uid`.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    except OSError as error:  # a thread's number, for one
        raise NotKinError(f"pid {pid}: {error.strerror}") from error
    try:
        process = psutil.Process(pid)
        found = (process.ppid(), process.uids().real)
    except psutil.NoSuchProcess:
        os.close(pidfd)
        return None
    if found == (parent_pid, uid):
        return pidfd
    os.close(pidfd)
    raise NotKinError(f"pid {pid} is a child of {found[0]} with user id {found[1]}, not of {parent_pid} with {uid}")


def kill(pidfd: int) -> None:
    """SIGKILL, unless it has ended."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def has_ended(pidfd: int) -> bool:
    """Whether the process has ended, waited for or not."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def was_waited_for(pidfd: int) -> bool:
    """Whether nothing is left of the process."""
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except ProcessLookupError:
        return True
    return False
