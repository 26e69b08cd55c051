"""What the kernel says of a process, which that process can't forge: whether it could run, and whether it did.

Read from /proc (man 5 proc_pid_stat) by the supervisor, only when a worker shows no sign of life.
"""

import psutil

from relay.supervisor.health import Vitals


def read_vitals(pid: int) -> Vitals | None:
    """None when the process is gone, or the kernel does not tell."""
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            status, times = process.status(), process.cpu_times()
    except psutil.Error:
        return None
    return Vitals(
        is_runnable=status == psutil.STATUS_RUNNING,
        is_traced=status == psutil.STATUS_TRACING_STOP,
        cpu_s=times.user + times.system,
    )
