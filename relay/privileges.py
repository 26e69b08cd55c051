"""Giving up privileges: what the control plane and the workers do before they meet anything from outside."""

import os
import pwd

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
