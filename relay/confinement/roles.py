"""What each role is confined to, once it has what it needs. Called by the control plane, the template and the worker.

Each process has given up its capabilities before (relay/privileges.py). Files are closed off by Landlock where the
kernel has it, and by seccomp in any case.
"""

from pathlib import Path

from relay.confinement import landlock, seccomp
from relay.privileges import forbid_children

SEGMENTS = Path("/dev/shm")
PROCESSES = Path("/proc")  # a worker notes when it was started, /proc/PID/stat


def confine_control_plane() -> None:
    """It has its log and its sockets: no file, no process, no socket but netlink, which tells interfaces' names."""
    forbid_children()
    landlock.restrict()
    seccomp.confine(seccomp.CONTROL_PLANE)


def confine_template() -> None:
    """It has the compiled code: it forks workers, which attach to their segments, and nothing else."""
    landlock.restrict(readable=(PROCESSES,), writable=(SEGMENTS,))
    seccomp.confine(seccomp.TEMPLATE)


def confine_worker() -> None:
    """It has its segments and its io_uring, which allows sends alone: no file, no socket, no process."""
    forbid_children()
    landlock.restrict()
    seccomp.confine(seccomp.WORKER)
