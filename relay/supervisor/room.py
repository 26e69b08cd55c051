"""Limits of this process, raised as far as it may be, and how much room for descriptors is left.

Children inherit them: workers have the sockets of all outputs, and the kernel counts their io_urings as locked memory.
A reserve is never given to outputs: a relay at its limit must still be able to replace a process that has died.
Source: man 2 getrlimit (RLIMIT_NOFILE, RLIMIT_MEMLOCK), man 5 proc (/proc/PID/fd).
"""

import contextlib
import resource

import psutil

DESCRIPTORS_WANTED = 1 << 20
RESERVE = 64  # a start of every child at once takes about 20, a look at interfaces or a log file one
AT_START_MIN = 160  # the reserve, and about 60 of the supervisor's own, before workers and rings
REMEDY = "raise LimitNOFILE= of its service, or `ulimit -n`"


def raise_limits() -> int:
    """As much as wanted where the process may, else the hard limit; return how many descriptors may be open now."""
    _raise(resource.RLIMIT_NOFILE, DESCRIPTORS_WANTED)
    _raise(resource.RLIMIT_MEMLOCK, resource.RLIM_INFINITY)
    return limit_now()


def _raise(kind: int, wanted: int) -> None:
    _, hard = resource.getrlimit(kind)
    for limits in ((wanted, hard), (wanted, wanted), (hard, hard)):
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, limits)
            return


def limit_now() -> int:
    """How many descriptors this process may have open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def left() -> int:
    """How many more may be opened without touching the reserve; below 0 when it is touched."""
    return limit_now() - RESERVE - psutil.Process().num_fds()
