"""CPU time of processes, to the nanosecond: what `man 3 clock_getcpuclockid` gives, for any process of the machine.

/proc/stat counts ticks by sampling: a process that works in bursts between two ticks costs nothing there.
"""

import time
from collections.abc import Iterable
from pathlib import Path

import psutil

CPUCLOCK_SCHED = 2  # include/linux/posix-timers.h


def cpu_clock(pid: int) -> int:
    """The clock id of a process' CPU time, as clock_getcpuclockid makes it."""
    return (~pid << 3) | CPUCLOCK_SCHED


def cpu_ns(pid: int) -> int:
    """CPU time that a process has used, all its threads together; 0 when it is gone."""
    try:
        return time.clock_gettime_ns(cpu_clock(pid))
    except OSError:
        return 0


def total_ns(pids: Iterable[int]) -> int:
    """The sum over processes."""
    return sum(cpu_ns(pid) for pid in pids)


def ksoftirqd_pids() -> list[int]:
    """The kernel threads that work for the network when no process can be charged."""
    return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/comm") if _comm(path).startswith("ksoftirqd/")]


def _comm(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it ended between the two looks
        return ""


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    try:
        process = psutil.Process(pid)
        return [pid, *(child.pid for child in process.children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def is_alive(pid: int) -> bool:
    """Whether a process still runs; one that ended and was not waited for yet does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
