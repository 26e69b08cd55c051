"""Giving up privileges: what each process does before it meets anything from outside, and what it keeps."""

import os
import pwd
import resource
from collections.abc import Collection
from pathlib import Path

from relay.confinement import capabilities
from relay.confinement.capabilities import prctl
from relay.errors import PreflightError

PR_SET_DUMPABLE = 4
PR_SET_NO_NEW_PRIVS = 38


def drop_to(uid: int, gid: int) -> None:
    """Become `uid`:`gid` for good, with no capability, no supplementary group and no way to gain any of them.

    A process that never was root keeps its user, who is its supervisor's, too. Raises PreflightError when the kernel
    left a way back.
    """
    if os.geteuid() == 0:
        capabilities.bound_to(())
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        if uid != 0 and 0 in os.getresuid():
            raise PreflightError(f"could not give up root for uid {uid}")
        # No ptrace by the same user, and nothing to read in /proc. A supervisor of the same user must see its children
        # there, also where /proc hides processes that one may not trace (hidepid, ProtectProc).
        prctl(PR_SET_DUMPABLE, 0)
    _check_alone()
    capabilities.keep_only(())
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _check_alone() -> None:
    """Raises PreflightError when other threads run: each has capabilities of its own, and would keep them."""
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads != 1:
        raise PreflightError(f"{threads} threads run where privileges are given up: a library has started them")


def keep_for_supervising(kept: Collection[int] = capabilities.SUPERVISOR) -> None:
    """In the supervisor, once it has started: only what sockets and children need later. Raises OSError.

    It may have a little more again when it starts anew, which is another program of root's.
    """
    _check_alone()
    capabilities.bound_to(capabilities.AT_START)
    capabilities.keep_only(kept)


def resolve_user(user: str | None, group: str | None) -> tuple[int, int]:
    """The uid and gid to run children as: as asked, else the caller behind sudo, else nobody.

    Raises PreflightError for a name that does not exist.
    """
    import grp

    try:
        if user is not None:
            entry = pwd.getpwnam(user)
        elif os.environ.get("SUDO_UID", "0") != "0":
            entry = pwd.getpwuid(int(os.environ["SUDO_UID"]))
        else:
            entry = pwd.getpwnam("nobody")
    except KeyError as error:
        raise PreflightError(f"no user {user or 'nobody'!r}: choose an existing one with --user") from error
    if group is None:
        return entry.pw_uid, entry.pw_gid
    try:
        return entry.pw_uid, grp.getgrnam(group).gr_gid
    except KeyError as error:
        raise PreflightError(f"no group {group!r}: choose an existing one with --group") from error


def resolve_trusted_group(name: str | None) -> int | None:
    """The gid of the group whose members may change things; None for none.

    Raises PreflightError for one that does not exist, or that stands for every unknown group.
    """
    import grp

    if name is None:
        return None
    try:
        gid = grp.getgrnam(name).gr_gid
    except KeyError as error:
        raise PreflightError(f"no group {name!r}: choose an existing one with --socket-group") from error
    if gid == overflow_id("gid"):
        raise PreflightError(f"group {name!r} stands for every group that is not known here: choose another")
    return gid


def overflow_id(kind: str) -> int:
    """The "uid" or "gid" that the kernel shows for one that is not mapped here. man 7 user_namespaces."""
    return int(Path(f"/proc/sys/kernel/overflow{kind}").read_text())
