"""Giving up privileges: what the control plane and the workers do before they meet anything from outside."""

import os
import pwd
from pathlib import Path

from relay.errors import PreflightError


def drop_to(uid: int, gid: int) -> None:
    """Become `uid`:`gid` for good, with no supplementary group. A no-op for a process without privileges.

    Raises PreflightError when the kernel left a way back.
    """
    if os.geteuid() != 0:
        return
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    if uid != 0 and 0 in os.getresuid():
        raise PreflightError(f"could not give up root for uid {uid}")


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
