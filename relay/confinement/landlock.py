"""Landlock: no file can be opened but beneath the given directories, nothing bound, connected or signalled.

Where the kernel has none of it, nothing happens: seccomp stands alone then.
Source: man 7 landlock, linux/landlock.h.
"""

import ctypes
import errno
import os
from collections.abc import Mapping
from pathlib import Path

SYS_LANDLOCK_CREATE_RULESET = 444  # the same numbers on every architecture
SYS_LANDLOCK_ADD_RULE = 445
SYS_LANDLOCK_RESTRICT_SELF = 446
LANDLOCK_CREATE_RULESET_VERSION = 1
LANDLOCK_RULE_PATH_BENEATH = 1
LANDLOCK_ACCESS_FS_WRITE_FILE = 1 << 1
LANDLOCK_ACCESS_FS_READ_FILE = 1 << 2
READ = LANDLOCK_ACCESS_FS_READ_FILE
READ_AND_WRITE = LANDLOCK_ACCESS_FS_READ_FILE | LANDLOCK_ACCESS_FS_WRITE_FILE
# Rights of files, of the network, and scopes that each ABI knows.
FS_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
LANDLOCK_ACCESS_NET = 0b11  # bind and connect TCP, from ABI 4 on
LANDLOCK_SCOPE = 0b11  # abstract unix sockets and signals, from ABI 6 on


class RulesetAttr(ctypes.Structure):
    """struct landlock_ruleset_attr."""

    _fields_ = (
        ("handled_access_fs", ctypes.c_uint64),
        ("handled_access_net", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    )


class PathBeneathAttr(ctypes.Structure):
    """struct landlock_path_beneath_attr, which is packed."""

    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


_libc = ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: object) -> int:
    result = int(_libc.syscall(ctypes.c_long(number), *arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def abi() -> int:
    """The kernel's version of Landlock, 0 without."""
    try:
        return _call(
            SYS_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(LANDLOCK_CREATE_RULESET_VERSION)
        )
    except OSError as error:
        # EPERM: a container's seccomp filter that does not know the call.
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
            return 0
        raise


def restrict(beneath: Mapping[Path, int] | None = None) -> bool:
    """Restrict this process and its children for good; False where the kernel can't. Needs PR_SET_NO_NEW_PRIVS.

    `beneath`: the rights, READ or READ_AND_WRITE, that stay beneath a directory. What is open already stays usable.
    Raises OSError.
    """
    version = abi()
    if version == 0:
        return False
    attr = RulesetAttr(
        handled_access_fs=(1 << FS_RIGHTS.get(version, max(FS_RIGHTS.values()))) - 1,
        handled_access_net=LANDLOCK_ACCESS_NET if version >= 4 else 0,
        scoped=LANDLOCK_SCOPE if version >= 6 else 0,
    )
    ruleset = _call(
        SYS_LANDLOCK_CREATE_RULESET, ctypes.byref(attr), ctypes.c_size_t(ctypes.sizeof(attr)), ctypes.c_uint32(0)
    )
    try:
        for path, rights in (beneath or {}).items():
            directory = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                rule = PathBeneathAttr(rights, directory)
                _call(
                    SYS_LANDLOCK_ADD_RULE,
                    ctypes.c_int(ruleset),
                    ctypes.c_int(LANDLOCK_RULE_PATH_BENEATH),
                    ctypes.byref(rule),
                    ctypes.c_uint32(0),
                )
            finally:
                os.close(directory)
        _call(SYS_LANDLOCK_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    finally:
        os.close(ruleset)
    return True
