"""Seccomp: a process may make the system calls of a list, and no others.

A filter is classic BPF over struct seccomp_data. Calls of the list pass, some of them with certain arguments only;
those that Python makes when it reports an error (it looks for source text) are refused with EACCES; any other call
kills the process with SIGSYS, which the supervisor logs. Memory can't be made executable: compiled code is there
already. Of calls that always pass the kernel keeps a bitmap and runs no filter for them; all that the loop makes are.
Source: man 2 seccomp, linux/seccomp.h, linux/audit.h; numbers from asm/unistd_64.h and asm-generic/unistd.h.
"""

import ctypes
import errno
import platform
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
CLONE_THREAD = 0x0001_0000
CLONE_NAMESPACES = 0x7E02_0000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
F_GETFL = 3
F_DUPFD_CLOEXEC = 1030
AT_EMPTY_PATH = 0x1000  # how newfstatat is fstat
TCGETS = 0x5401
FIONBIO = 0x5421
SOL_SOCKET = 1
SO_ATTACH_FILTER = 26
PR_SET_TIMERSLACK = 29
PR_SET_VMA = 0x5356_4D41  # names memory for /proc/PID/maps, as C libraries do
STDERR = 2

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
            "shutdown": 48, "getsockname": 51, "getpeername": 52, "socketpair": 53, "setsockopt": 54, "getsockopt": 55,
            "clone": 56, "fork": 57, "vfork": 58, "exit": 60, "wait4": 61, "fcntl": 72, "readlink": 89,
            "sigaltstack": 131, "prctl": 157, "gettid": 186, "gettimeofday": 96, "tgkill": 234,
            "getuid": 102, "geteuid": 107, "getdents64": 217,
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
            "getsockname": 204, "getpeername": 205, "socketpair": 199, "setsockopt": 208, "getsockopt": 209,
            "clone": 220, "exit": 93, "wait4": 260, "fcntl": 25, "sigaltstack": 132, "prctl": 167, "gettid": 178,
            "gettimeofday": 169, "tgkill": 131,
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


@dataclass(frozen=True)
class Check:
    """What an argument must be: one of `values`, or without any bit of `without`; `otherwise` is the verdict.

    Every argument that is checked is an int: the low half counts, for the kernel as well.
    """

    argument: int
    values: tuple[int, ...] = ()
    without: int = 0
    otherwise: int = SECCOMP_RET_KILL_PROCESS


Policy = Mapping[str, tuple[Check, ...]]  # by the name of the call; no checks: it always passes
EACCES = SECCOMP_RET_ERRNO | errno.EACCES


def _always(*names: str) -> dict[str, tuple[Check, ...]]:
    return dict.fromkeys(names, ())


# What any of these Python processes does: memory that is not executable, time, signals, its own descriptors, its end.
BASIC: Policy = {
    **_always(
        "close", "fstat", "munmap", "mremap", "brk", "madvise", "futex", "rt_sigaction", "rt_sigprocmask",
        "rt_sigreturn", "sigaltstack", "restart_syscall", "sched_yield", "clock_gettime", "clock_getres",
        "clock_nanosleep", "gettimeofday", "getpid", "gettid", "getuid", "geteuid", "getrandom", "poll", "ppoll",
        "getsockname", "getpeername", "getsockopt", "recvmsg", "sendto", "exit", "exit_group",
    ),
    "mmap": (Check(2, without=PROT_EXEC),),
    "mprotect": (Check(2, without=PROT_EXEC),),
    "fcntl": (Check(1, (F_GETFL, F_DUPFD_CLOEXEC)),),
    "newfstatat": (Check(3, (AT_EMPTY_PATH,), otherwise=EACCES),),
    "ioctl": (Check(1, (FIONBIO,), otherwise=EACCES),),
    "write": (Check(0, (STDERR,)),),
    "writev": (Check(0, (STDERR,)),),
    "prctl": (Check(0, (PR_SET_VMA,)),),
}  # fmt: skip
# What Python tries where it reports an error, or imports late. It reports without the text then.
REFUSED = ("open", "openat", "stat", "lstat", "statx", "access", "faccessat", "readlink", "readlinkat")

CONTROL_PLANE: Policy = {
    **BASIC,
    **_always("recvfrom", "sendmsg", "accept", "accept4", "shutdown", "epoll_wait", "epoll_pwait", "epoll_ctl"),
}
WORKER: Policy = {
    **BASIC,
    **_always("io_uring_enter", "recvmmsg"),
    "setsockopt": (Check(1, (SOL_SOCKET,)), Check(2, (SO_ATTACH_FILTER,))),  # to let no more in at the end
}
# Forks workers, which have their set-up before them: segments, an io_uring, a core, and the tighter filter.
TEMPLATE: Policy = {
    **WORKER,
    **_always(
        "read", "write", "lseek", "recvfrom", "sendmsg", "accept", "accept4", "fork", "wait4", "set_robust_list",
        "select", "pselect6", "tgkill", *REFUSED, "newfstatat", "getdents64", "io_uring_setup", "io_uring_register",
        "landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self",
    ),
    "clone": (Check(0, without=CLONE_THREAD | CLONE_NAMESPACES),),
    "ioctl": (Check(1, (FIONBIO, TCGETS), otherwise=EACCES),),
    "prctl": (Check(0, (PR_SET_VMA, PR_SET_TIMERSLACK, PR_SET_SECCOMP)),),
    "prlimit64": (Check(0, (0,)),),  # its own
    "sched_setaffinity": (Check(0, (0,)),),
}  # fmt: skip


def of_process(policy: Policy, pid: int) -> Policy:
    """The policy for one process, which may send a signal to itself alone: so it aborts."""
    return {**policy, "tgkill": (Check(0, (pid,)),)}


def _verdict(number: int, checks: Sequence[Check], passed: int = SECCOMP_RET_ALLOW) -> list[Instruction]:
    """What becomes of one call; goes on behind this code for any other."""
    code: list[Instruction] = []
    for check in checks:
        code.append((LD_WORD_ABS, 0, 0, ARGUMENTS_OFFSET + 8 * check.argument))  # both machines are little-endian
        if check.without:
            code.append((JSET_K, 0, 1, check.without))
        code += [(JEQ_K, len(check.values) - at, 0, value) for at, value in enumerate(check.values)]
        code.append((RET_K, 0, 0, check.otherwise))
    code.append((RET_K, 0, 0, passed))
    return [(JEQ_K, 0, len(code), number), *code]


def assemble(policy: Policy, machine: str) -> list[Instruction]:
    """The filter of a policy for `machine`, as platform.machine() names it. Raises KeyError for another one.

    Names that the machine has no call for are left out.
    """
    architecture, numbers = ARCHITECTURES[machine]
    kill = (RET_K, 0, 0, SECCOMP_RET_KILL_PROCESS)
    program: list[Instruction] = [
        (LD_WORD_ABS, 0, 0, ARCH_OFFSET),
        (JEQ_K, 1, 0, architecture),
        kill,
        (LD_WORD_ABS, 0, 0, NR_OFFSET),
        (JGE_K, 0, 1, X32_SYSCALL_BIT),
        kill,
    ]
    for name in sorted(policy, key=lambda name: (len(policy[name]), name)):
        if name in numbers:
            program += _verdict(numbers[name], policy[name])
    for name in REFUSED:
        if name in numbers and name not in policy:
            program += _verdict(numbers[name], (), EACCES)
    return [*program, kill]


def encode(program: Sequence[Instruction]) -> bytes:
    """The program as an array of struct sock_filter."""
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def confine(policy: Policy) -> bool:
    """Install the filter for this process and its children, for good; False where there can be none.

    That is on a kernel without seccomp, or on a machine that has no list. Needs PR_SET_NO_NEW_PRIVS, and one thread.
    Raises OSError.
    """
    if platform.machine() not in ARCHITECTURES:
        return False
    program = assemble(policy, platform.machine())
    code = ctypes.create_string_buffer(encode(program))
    fprog = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    try:
        prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(fprog))
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True
