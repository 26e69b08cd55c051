"""Preflight: what the machine must allow before anything starts. Each refusal names the remedy in its line."""

import ctypes
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import psutil

from logging_shm.sinks.selection import SinkError
from relay.config import Options, parse_cores, sinks
from relay.dataplane import CACHE_DIRECTORY
from relay.errors import PreflightError
from relay.privileges import resolve_trusted_group
from relay.supervisor.interfaces import snapshot
from relay.trust import check_cache, check_compiled, trusted_uids

KERNEL_MIN = (6, 1)  # IORING_SETUP_DEFER_TASKRUN
CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_NET_RAW": 13}  # linux/capability.h
SYS_IO_URING_SETUP = 425  # the same on every architecture
IO_URING_PARAMS_BYTES = 120  # struct io_uring_params
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


def check_io_uring() -> None:
    """Make one and close it. Raises PreflightError with the kernel's reason when a worker could not have one."""
    libc = ctypes.CDLL(None, use_errno=True)
    parameters = ctypes.create_string_buffer(IO_URING_PARAMS_BYTES)
    descriptor = libc.syscall(ctypes.c_long(SYS_IO_URING_SETUP), ctypes.c_uint(1), parameters)
    if descriptor < 0:
        raise PreflightError(
            f"io_uring is refused: {os.strerror(ctypes.get_errno())}: a seccomp filter forbids it, as containers' do, "
            "or RLIMIT_MEMLOCK is low: allow io_uring_setup, io_uring_enter and io_uring_register, raise the limit"
        )
    os.close(descriptor)


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


def check(options: Options) -> tuple[int, ...]:
    """Check everything; return the cores of the workers. Raises PreflightError."""
    disabled = int(IO_URING_DISABLED.read_text()) if IO_URING_DISABLED.exists() else 0
    check_kernel(platform.release(), disabled)
    check_io_uring()
    status = Path("/proc/self/status").read_text()
    effective = re.search(r"^CapEff:\s*([0-9a-f]+)", status, re.MULTILINE)
    check_capabilities(int(effective[1], 16) if effective else 0)
    check_cache(CACHE_DIRECTORY, trusted_uids())
    check_compiled(CACHE_DIRECTORY)
    check_interfaces(options.interfaces)
    check_sinks(options)
    resolve_trusted_group(options.socket_group)
    return choose_cores(options, sorted(psutil.Process(os.getpid()).cpu_affinity()))
