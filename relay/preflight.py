"""Preflight: what the machine must allow before anything starts. Each refusal names the remedy in its line."""

import contextlib
import errno
import os
import platform
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from logging_shm.sinks.selection import SinkError
from relay.config import Options, parse_cores, sinks
from relay.dataplane import CACHE_DIRECTORY
from relay.dataplane.uring_params import SQ_ENTRIES, try_io_urings
from relay.errors import PreflightError
from relay.privileges import drop_to, resolve_trusted_group
from relay.supervisor import room
from relay.supervisor.interfaces import snapshot
from relay.trust import check_cache, check_compiled, trusted_uids

KERNEL_MIN = (6, 1)  # IORING_SETUP_DEFER_TASKRUN
CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_NET_RAW": 13}  # linux/capability.h
DESCRIPTORS_A_WORKER = 9  # its channel, a pidfd, its copy arena, what is passed to it; besides its rings
URINGS_A_WORKER = 2  # at a hand-over its predecessor still has one
ALLOW_IT = "allow it in the profile of the container or service"
# Newer kernels, 6.18 for one, count rings as locked memory of a user without CAP_IPC_LOCK, all processes together.
IO_URING_REMEDIES = {
    errno.EPERM: f"a seccomp filter or a security module forbids it: {ALLOW_IT}",
    errno.EACCES: f"a security module forbids it: {ALLOW_IT}",
    errno.ENOSYS: f"the kernel was built without it, or a seccomp filter forbids it: {ALLOW_IT}",
    errno.ENOMEM: "raise LimitMEMLOCK= of its service, or `ulimit -l`, or make room in memory",
    errno.EINVAL: "the relay needs Linux 6.1 or newer",
}
IO_URING_DISABLED = Path("/proc/sys/kernel/io_uring_disabled")


def check_kernel(release: str, io_uring_disabled: int) -> None:
    """Raises PreflightError for a kernel that lacks io_uring as the relay uses it, or forbids it."""
    match = re.match(r"(\d+)\.(\d+)", release)
    if match is None or (int(match[1]), int(match[2])) < KERNEL_MIN:
        raise PreflightError(f"kernel {release} is too old: the relay needs Linux 6.1 or newer")
    if io_uring_disabled:
        raise PreflightError(
            f"io_uring is disabled (kernel.io_uring_disabled = {io_uring_disabled}): "
            "run `sysctl kernel.io_uring_disabled=0`"
        )


def check_io_uring(owner: tuple[int, int], workers: int) -> None:
    """Try what workers will do, as the user that they run as: only so limits and policies are met that hold for them.

    Raises PreflightError when the kernel does not let them have an io_uring, whatever the reason.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        _try_io_uring(owner, workers, writer)
    os.close(writer)
    with os.fdopen(reader) as answer:
        refused = answer.read().split()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        raise PreflightError(
            f"io_uring: ended by {signal.Signals(os.WTERMSIG(status)).name}: a seccomp filter forbids it: {ALLOW_IT}"
        )
    if status and not refused:
        raise PreflightError("io_uring: the trial of it failed: see above")
    if refused:
        call, code = refused[0], int(refused[1])
        remedy = IO_URING_REMEDIES.get(code, "see its man page")
        raise PreflightError(f"{call}: {os.strerror(code)}: {remedy}")


def _try_io_uring(owner: tuple[int, int], workers: int, writer: int) -> None:
    """In a child: write what was refused, and end."""
    try:
        with contextlib.suppress(PermissionError):  # a service that is not root may be forbidden capset(2)
            drop_to(*owner)
        try_io_urings(SQ_ENTRIES, URINGS_A_WORKER * workers)
        os._exit(0)
    except OSError as error:
        os.write(writer, f"{error.filename or 'dropping_privileges'} {error.errno}".encode())
    except PreflightError as error:
        sys.stderr.write(f"{error}\n")
    finally:
        os._exit(1)


def check_descriptors(limit: int, workers: int, interfaces: int) -> None:
    """Raises PreflightError when so many descriptors are too few for the relay without any output."""
    wanted = room.AT_START_MIN + workers * (interfaces + DESCRIPTORS_A_WORKER)
    if limit < wanted:
        raise PreflightError(
            f"the limit of open files is {limit}: {wanted} are needed, and one for each output: {room.REMEDY}"
        )


def check_capabilities(effective: int) -> None:
    """Raises PreflightError when a capability is missing from a CapEff mask."""
    for name, bit in CAPABILITIES.items():
        if not effective >> bit & 1:
            raise PreflightError(f"{name} is missing: start as root, with `sudo make run IFACE=…` or `sudo mcrd`")


def choose_cores(options: Options, allowed: Sequence[int]) -> tuple[int, ...]:
    """The core of each worker. Raises PreflightError when there are not as many as asked for."""
    if options.cores is None:
        wanted = options.num_workers or 1
        if wanted > len(allowed):
            raise PreflightError(f"{wanted} workers need as many cores: this process may use {len(allowed)}")
        return tuple(allowed[:wanted])
    cores = parse_cores(options.cores)
    for core in cores:
        if core not in allowed:
            raise PreflightError(
                f"core {core} is not allowed to this process: allowed are {', '.join(map(str, allowed))}"
            )
    if options.num_workers is not None and options.num_workers != len(cores):
        if options.num_workers > len(cores):
            raise PreflightError(f"{options.num_workers} workers need as many cores: --cores names {len(cores)}")
        return cores[: options.num_workers]
    return cores


def check_interfaces(names: Sequence[str]) -> None:
    """Raises PreflightError for a name that is no interface of this host."""
    existing = snapshot()
    for name in names:
        if name not in existing:
            raise PreflightError(f"no interface {name}: this host has {', '.join(sorted(existing))}")


def check_sinks(options: Options) -> None:
    """Raises PreflightError for a log file that can't be written."""
    for sink in sinks(options):
        try:
            sink.check()
        except SinkError as error:
            raise PreflightError(str(error)) from None


def check(options: Options, owner: tuple[int, int]) -> tuple[int, ...]:
    """Check everything for workers that run as `owner`; return their cores. Raises PreflightError."""
    disabled = int(IO_URING_DISABLED.read_text()) if IO_URING_DISABLED.exists() else 0
    check_kernel(platform.release(), disabled)
    status = Path("/proc/self/status").read_text()
    effective = re.search(r"^CapEff:\s*([0-9a-f]+)", status, re.MULTILINE)
    check_capabilities(int(effective[1], 16) if effective else 0)
    check_cache(CACHE_DIRECTORY, trusted_uids())
    check_compiled(CACHE_DIRECTORY)
    check_interfaces(options.interfaces)
    check_sinks(options)
    resolve_trusted_group(options.socket_group)
    cores = choose_cores(options, sorted(psutil.Process(os.getpid()).cpu_affinity()))
    check_descriptors(room.raise_limits(), len(cores), len(options.interfaces))
    check_io_uring(owner, len(cores))
    return cores
