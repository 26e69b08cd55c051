"""Seccomp: a process may make the system calls of a list, and no others.

A filter is classic BPF over struct seccomp_data. Calls of the list pass, some with certain arguments only; those that
Python makes when it reports an error (it looks for source text) are refused with EACCES; any other call kills the
process with SIGSYS, which the supervisor logs. Memory can't be made executable: compiled code is there already.
Source: man 2 seccomp, linux/seccomp.h, linux/audit.h; numbers from asm/unistd_64.h and asm-generic/unistd.h.
"""

import ctypes
import errno
import platform
import struct
from collections.abc import Collection

from relay.confinement.capabilities import prctl

PR_SET_SECCOMP = 22
SECCOMP_MODE_FILTER = 2
SECCOMP_RET_KILL_PROCESS = 0x8000_0000
SECCOMP_RET_ERRNO = 0x0005_0000
SECCOMP_RET_ALLOW = 0x7FFF_0000
NR_OFFSET = 0  # of struct seccomp_data
ARCH_OFFSET = 4
ARGUMENTS_OFFSET = 16
X32_SYSCALL_BIT = 0x4000_0000
PROT_EXEC = 4
PROTECTION = 2  # the argument of mmap and mprotect
REQUEST = 1  # of ioctl
DOMAIN = 0  # of socket
AF_NETLINK = 16
FIONBIO = 0x5421
SIOCGIFNAME = 0x8910

LD_WORD_ABS = 0x20  # linux/bpf_common.h
JEQ_K = 0x15
JGE_K = 0x35
JSET_K = 0x45
RET_K = 0x06

Instruction = tuple[int, int, int, int]

# AUDIT_ARCH, and the calls by name.
ARCHITECTURES: dict[str, tuple[int, dict[str, int]]] = {
    "x86_64": (
        0xC000_003E,
        {
            "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8,
            "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14,
            "rt_sigreturn": 15, "ioctl": 16, "writev": 20, "access": 21, "select": 23, "sched_yield": 24, "mremap": 25,
            "madvise": 28, "getpid": 39, "accept": 43, "sendto": 44, "recvfrom": 45, "sendmsg": 46, "recvmsg": 47,
            "shutdown": 48, "bind": 49, "listen": 50, "socket": 41,
            "getsockname": 51, "getpeername": 52, "socketpair": 53, "setsockopt": 54, "getsockopt": 55,
            "clone": 56, "fork": 57, "vfork": 58, "exit": 60, "wait4": 61, "fcntl": 72, "readlink": 89,
            "sigaltstack": 131, "prctl": 157, "gettid": 186, "getuid": 102, "geteuid": 107, "getdents64": 217,
            "restart_syscall": 219, "futex": 202, "sched_setaffinity": 203, "sched_getaffinity": 204,
            "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231, "epoll_wait": 232,
            "epoll_ctl": 233, "openat": 257, "newfstatat": 262, "readlinkat": 267, "pselect6": 270, "ppoll": 271,
            "set_robust_list": 273, "epoll_pwait": 281, "accept4": 288, "epoll_create1": 291, "recvmmsg": 299,
            "prlimit64": 302, "seccomp": 317, "getrandom": 318, "statx": 332, "rseq": 334, "io_uring_setup": 425,
            "io_uring_enter": 426, "io_uring_register": 427, "clone3": 435, "landlock_create_ruleset": 444,
            "landlock_add_rule": 445, "landlock_restrict_self": 446,
        },
    ),
    "aarch64": (
        0xC000_00B7,
        {
            "read": 63, "write": 64, "close": 57, "fstat": 80, "lseek": 62, "mmap": 222, "mprotect": 226,
            "munmap": 215, "brk": 214, "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139, "ioctl": 29,
            "writev": 66, "faccessat": 48, "sched_yield": 124, "mremap": 216, "madvise": 233, "getpid": 172,
            "accept": 202, "sendto": 206, "recvfrom": 207, "sendmsg": 211, "recvmsg": 212, "shutdown": 210,
            "bind": 200, "listen": 201, "socket": 198,
            "getsockname": 204, "getpeername": 205, "socketpair": 199, "setsockopt": 208, "getsockopt": 209,
            "clone": 220, "exit": 93, "wait4": 260, "fcntl": 25, "sigaltstack": 132, "prctl": 167, "gettid": 178,
            "getuid": 174, "geteuid": 175, "getdents64": 61, "restart_syscall": 128, "futex": 98,
            "sched_setaffinity": 122, "sched_getaffinity": 123, "clock_gettime": 113, "clock_getres": 114,
            "clock_nanosleep": 115, "exit_group": 94, "epoll_ctl": 21, "openat": 56, "newfstatat": 79,
            "readlinkat": 78, "pselect6": 72, "ppoll": 73, "set_robust_list": 99, "epoll_pwait": 22, "accept4": 242,
            "epoll_create1": 20, "recvmmsg": 243, "prlimit64": 261, "seccomp": 277, "getrandom": 278, "statx": 291,
            "rseq": 293, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "clone3": 435,
            "landlock_create_ruleset": 444, "landlock_add_rule": 445, "landlock_restrict_self": 446,
        },
    ),
}  # fmt: skip

# What every Python process does: memory that is not executable, time, signals, its own descriptors, its end.
BASIC = frozenset(
    {
        "read", "write", "writev", "close", "fstat", "lseek", "munmap", "mremap", "brk", "madvise", "futex",
        "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "restart_syscall", "sched_yield",
        "clock_gettime", "clock_getres", "clock_nanosleep", "getpid", "gettid", "getrandom", "fcntl", "poll", "ppoll",
        "exit", "exit_group", "newfstatat",
    }
)  # fmt: skip
WITHOUT_EXECUTION = ("mmap", "mprotect")
# Allowed with one of these values as the argument of that number.
BY_ARGUMENT = {"ioctl": (REQUEST, (FIONBIO, SIOCGIFNAME))}
NETLINK_ONLY = {"socket": (DOMAIN, (AF_NETLINK,))}
REFUSED = frozenset(
    {"open", "openat", "stat", "lstat", "statx", "access", "faccessat", "readlink", "readlinkat", "ioctl", "socket"}
)

CONTROL_PLANE = BASIC | {
    "recvfrom", "recvmsg", "sendto", "sendmsg", "accept", "accept4", "shutdown", "getsockname", "getpeername",
    "getsockopt", "setsockopt", "epoll_wait", "epoll_pwait", "epoll_ctl", "epoll_create1",
    "socketpair", "getuid", "geteuid", "bind", "listen", "socket", "prlimit64",
}  # fmt: skip
WORKER = BASIC | {
    "io_uring_enter", "recvmmsg", "recvmsg", "recvfrom", "sendmsg", "sendto", "getsockopt", "setsockopt", "getsockname",
    "getpeername",
}  # fmt: skip
# Forks workers, which have all their set-up before them: segments, an io_uring, a core, and the tighter filter.
TEMPLATE = WORKER | {
    "clone", "clone3", "fork", "vfork", "wait4", "set_robust_list", "rseq", "select", "pselect6", "accept", "accept4",
    "sched_setaffinity", "sched_getaffinity", "prctl", "prlimit64", "seccomp", "socketpair", "getuid", "geteuid",
    "open", "openat", "stat", "lstat", "statx", "access", "faccessat", "readlink", "readlinkat",
    "getdents64", "io_uring_setup", "io_uring_register", "landlock_create_ruleset", "landlock_add_rule",
    "landlock_restrict_self", "getsockname", "getpeername",
}  # fmt: skip


def assemble(allowed: Collection[str], machine: str) -> list[Instruction]:
    """The filter of a list of calls for `machine`, as platform.machine() names it. Raises KeyError for another one."""
    architecture, numbers = ARCHITECTURES[machine]
    allow, kill = (RET_K, 0, 0, SECCOMP_RET_ALLOW), (RET_K, 0, 0, SECCOMP_RET_KILL_PROCESS)
    refuse = (RET_K, 0, 0, SECCOMP_RET_ERRNO | errno.EACCES)
    program: list[Instruction] = [
        (LD_WORD_ABS, 0, 0, ARCH_OFFSET),
        (JEQ_K, 1, 0, architecture),
        kill,
        (LD_WORD_ABS, 0, 0, NR_OFFSET),
        (JGE_K, 0, 1, X32_SYSCALL_BIT),
        kill,
    ]
    restricted = BY_ARGUMENT | {name: rule for name, rule in NETLINK_ONLY.items() if name in allowed}
    for name in sorted(set(allowed) - set(restricted), key=lambda name: numbers.get(name, -1)):
        if name in numbers:
            program += [(JEQ_K, 0, 1, numbers[name]), allow]
    for name, (argument, values) in restricted.items():
        values_checked = [step for value in values for step in ((JEQ_K, 0, 1, value), allow)]
        program += [
            (JEQ_K, 0, 2 + len(values_checked), numbers[name]),
            (LD_WORD_ABS, 0, 0, ARGUMENTS_OFFSET + 8 * argument),
            *values_checked,
            refuse,
        ]
    for name in WITHOUT_EXECUTION:
        program += [
            (JEQ_K, 0, 4, numbers[name]),
            (LD_WORD_ABS, 0, 0, ARGUMENTS_OFFSET + 8 * PROTECTION),  # the low half; both machines are little-endian
            (JSET_K, 0, 1, PROT_EXEC),
            kill,
            allow,
        ]
    for name in sorted(REFUSED - set(allowed) - set(restricted)):
        if name in numbers:
            program += [(JEQ_K, 0, 1, numbers[name]), refuse]
    return [*program, kill]


def encode(program: Collection[Instruction]) -> bytes:
    """The program as an array of struct sock_filter."""
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def confine(allowed: Collection[str]) -> bool:
    """Install the filter for this process and its children, for good; False on a machine that has no list.

    Needs PR_SET_NO_NEW_PRIVS. Raises OSError.
    """
    if platform.machine() not in ARCHITECTURES:
        return False
    program = assemble(allowed, platform.machine())
    code = ctypes.create_string_buffer(encode(program))
    fprog = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(fprog))
    return True
