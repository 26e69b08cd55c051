"""Checks of the host: kernel, io_uring, limits, socket buffers, clock, shared memory."""

from collections.abc import Iterator

from relay.cli import host
from relay.cli.checks.registry import Found, check
from relay.cli.checks.situation import Situation
from relay.errors import PreflightError
from relay.preflight import URINGS_A_WORKER, check_descriptors, check_kernel
from relay.supervisor import room

URING_BYTES = 128 << 10  # 1 024 SQEs of 64 bytes, 2 048 CQEs of 16, rounded up
DESCRIPTORS_USED_MAX = 0.8  # of the limit, before outputs are near it
BUFFER_BYTES_MIN = 4 << 20  # some 30 ms of 1 Gbit/s
SHM_BYTES_A_WORKER = 20 << 20  # 6.5 MiB of log rings, 2.6 MiB of counters, and as much again at a hand-over
CLOCKS = ("tsc", "kvm-clock", "arch_sys_counter", "hyperv_clocksource_tsc_page")  # read without a system call


@check(why="the relay's io_uring needs IORING_SETUP_DEFER_TASKRUN, which came with Linux 6.1")
def kernel(situation: Situation) -> Iterator[Found]:
    """The kernel's version."""
    read = "/proc/sys/kernel/osrelease"
    release = situation.files.text("proc/sys/kernel/osrelease") or "unknown"
    try:
        check_kernel(release, 0)
    except PreflightError as error:
        yield Found("problem", str(error), read, "install Linux 6.1 or newer")
        return
    yield Found("ok", f"Linux {release}", read)


@check(why="workers send with io_uring and cannot do without")
def io_uring(situation: Situation) -> Iterator[Found]:
    """Whether io_uring is allowed: by the sysctl, and by trying it as the user that workers run as."""
    disabled = situation.files.setting("kernel/io_uring_disabled") or 0
    if disabled:
        read = "/proc/sys/kernel/io_uring_disabled"
        remedy = "sysctl kernel.io_uring_disabled=0"
        yield Found("problem", f"io_uring is disabled (kernel.io_uring_disabled = {disabled})", read, remedy)
    elif (refusal := situation.probes.io_uring_refusal) is not None:
        what, _, remedy = refusal.rpartition(": ")
        yield Found("problem", what, "a trial of io_uring_setup(2)", remedy)
    else:
        yield Found("ok", "io_uring is allowed", "a trial of io_uring_setup(2)")


@check(why="each output takes a descriptor; where none is left, outputs are refused and nothing else changes")
def open_files(situation: Situation) -> Iterator[Found]:
    """The limit of open files: the supervisor's, which it has raised as far as it may; else this process's."""
    path = f"{situation.process}/limits"
    soft, hard = host.limits(situation.files.text(path) or "").get("Max open files", ("unlimited", "unlimited"))
    limit = soft if situation.process != "proc/self" else hard
    used = situation.probes.descriptors_used
    read = f"/{path}"
    if not limit.isdecimal():
        yield Found("ok", f"open files: {limit}", read)
    elif used is not None and used > int(limit) * DESCRIPTORS_USED_MAX:
        yield Found("warning", f"the relay has {used} files open, {limit} are allowed", read, room.REMEDY)
    else:
        try:
            check_descriptors(int(limit), 1, 1)
        except PreflightError as error:
            yield Found("problem", str(error).partition(": ")[0], read, room.REMEDY)
            return
        yield Found("ok", f"open files: {limit} are allowed" + (f", {used} used" if used is not None else ""), read)


@check(why="newer kernels count io_urings as locked memory of the workers' user")
def locked_memory(situation: Situation) -> Iterator[Found]:
    """The limit of locked memory."""
    path = f"{situation.process}/limits"
    limit = host.limits(situation.files.text(path) or "").get("Max locked memory", ("unlimited",))[0]
    workers = len(situation.relay.stats["workers"]) if situation.relay is not None else 1
    needed = workers * URINGS_A_WORKER * URING_BYTES
    if limit.isdecimal() and int(limit) < needed:
        text = f"locked memory: {limit} bytes are allowed, {needed} may be needed"
        yield Found("warning", text, f"/{path}", "raise LimitMEMLOCK= of its service, or `ulimit -l`")
    else:
        yield Found("ok", f"locked memory: {limit}" + (" bytes" if limit.isdecimal() else ""), f"/{path}")


@check(why="the relay sets its own buffers as root; other senders and receivers on this host get no larger ones")
def socket_buffers(situation: Situation) -> Iterator[Found]:
    """net.core.rmem_max and wmem_max."""
    for name, whose in (("rmem_max", "receivers"), ("wmem_max", "senders")):
        value = situation.files.setting(f"net/core/{name}")
        if value is None:
            continue
        read = f"/proc/sys/net/core/{name}"
        if value < BUFFER_BYTES_MIN:
            text = f"net.core.{name} is {value}: {whose} on this host may lose bursts, the relay does not"
            yield Found("note", text, read, f"sysctl net.core.{name}={BUFFER_BYTES_MIN}")
        else:
            yield Found("ok", f"net.core.{name} is {value}", read)


@check(why="log rings and counters are files there: without room the relay does not start")
def shared_memory(situation: Situation) -> Iterator[Found]:
    """The space left in /dev/shm."""
    free = situation.probes.shm_free_bytes
    if free is None:
        return
    if free < SHM_BYTES_A_WORKER:
        remedy = "mount -o remount,size=256M /dev/shm; `mcrlog clean` removes what dead relays left"
        text = f"/dev/shm has {free >> 20} MiB left, a worker takes up to {SHM_BYTES_A_WORKER >> 20}"
        yield Found("warning", text, "df /dev/shm", remedy)
    else:
        yield Found("ok", f"/dev/shm has {free >> 20} MiB left", "df /dev/shm")


@check(why="logs, latencies and idling read the clock often: some clocks take a system call and microseconds for it")
def clock_source(situation: Situation) -> Iterator[Found]:
    """Whether the clock is read without a system call."""
    path = "sys/devices/system/clocksource/clocksource0/current_clocksource"
    source = situation.files.text(path)
    if source is None:
        return
    if source in CLOCKS:
        yield Found("ok", f"clock source {source}", f"/{path}")
    else:
        text = f"clock source {source}: each reading is a system call"
        yield Found("warning", text, f"/{path}", f"echo {CLOCKS[0]} > /{path}, if available_clocksource has it")


@check(why="relaying needs no time of day; comparing logs and latencies between hosts does")
def clock_synchronised(situation: Situation) -> Iterator[Found]:
    """Whether the kernel's clock is disciplined, by NTP or PTP."""
    synchronised = situation.probes.clock_is_synchronised
    if synchronised:
        yield Found("ok", "the clock is synchronised", "adjtimex(2)")
    elif synchronised is not None:
        yield Found("note", "the clock is not synchronised", "adjtimex(2)", "systemctl enable --now chrony")
