"""What each process is confined to, once it has set itself up. Called in that process; there is no way back.

The template opens segments for the workers that it forks; workers and the control plane open nothing any more.
Each process has given up its privileges before (relay/privileges.py), which is what lets it install filters.
"""

import os
import resource
from pathlib import Path

from relay.confinement import landlock, seccomp

SEGMENTS = Path("/dev/shm")
PROCESSES = Path("/proc")  # a segment's header names its writer by pid and start time


def confine_template() -> None:
    """Forking, and the set-up of workers. Raises OSError."""
    landlock.restrict({SEGMENTS: landlock.READ_AND_WRITE, PROCESSES: landlock.READ})
    seccomp.confine(seccomp.TEMPLATE)


def confine_worker() -> bool:
    """Sending, receiving and waiting on what it was handed; False without seccomp here. Raises OSError."""
    return _confine(seccomp.WORKER)


def confine_control_plane() -> bool:
    """Serving its sockets; False without seccomp here. Raises OSError."""
    return _confine(seccomp.CONTROL_PLANE)


def _confine(policy: seccomp.Policy) -> bool:
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    landlock.restrict()
    return seccomp.confine(seccomp.of_process(policy, os.getpid()))
