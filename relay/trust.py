"""Who could change files that a privileged process uses: nobody but root and whoever started the relay.

Numba's cache holds pickles and machine code. The caller behind sudo may write there: what `sudo make run` starts is his
own source anyway. The user that workers run as may not, unless it is the same. The same goes for the directory of the
control socket: who may put files there could have the relay change another's file, or answer in its place.
"""

import grp
import os
import pwd
import stat
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

from relay.errors import PreflightError

GROUP_WRITES = 0o020
OTHERS_WRITE = 0o002
ACL = "system.posix_acl_access"  # with one, the group's bits are what anybody named in it may do at most


def trusted_uids() -> frozenset[int]:
    """Root, this process's user, and the caller behind sudo."""
    uids = {0, os.geteuid()}
    if os.geteuid() == 0:
        uids.add(int(os.environ.get("SUDO_UID", "0")))
    return frozenset(uids)


def check_cache(directory: Path, trusted: Collection[int]) -> None:
    """Raises PreflightError when anybody but `trusted` could change what is in `directory`, or put another there.

    A directory that does not exist yet is judged by those that it would be made in.
    """
    resolved = directory.resolve()
    for path in {directory: None, resolved: None} | dict.fromkeys((*directory.parents, *resolved.parents)):
        # Where the sticky bit is set, as in /tmp, others can't replace what is not theirs; but they can add files.
        _check(path, trusted, sticky_helps=path not in (directory, resolved), what="compiled code")
    for path in _everything_in(resolved):
        _check(path, trusted, sticky_helps=False, what="compiled code")


def check_place(file: Path, trusted: Collection[int], what: str) -> None:
    """Raises PreflightError when anybody but `trusted` could put another file in the place of `file`, which is `what`.

    A sticky directory, such as /tmp, will do: there nobody removes what is another's.
    """
    directory = file.absolute().parent
    resolved = directory.resolve()
    for path in dict.fromkeys((directory, *directory.parents, resolved, *resolved.parents)):
        _check(path, trusted, sticky_helps=True, what=what)


def check_compiled(directory: Path) -> None:
    """Raises PreflightError when there is no compiled code, and it can't be written by this process either."""
    if directory.is_dir():
        return
    made_in = next(parent for parent in directory.parents if parent.is_dir())
    if not os.access(made_in, os.W_OK):
        compile_command = f"{sys.executable} -m relay.dataplane.precompile"  # a wheel has no Makefile
        raise PreflightError(f"no compiled code for these sources in {directory}: run `{compile_command}` as root")


def _everything_in(directory: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(directory):
        for name in (*folders, *files):
            yield Path(folder, name)


def _check(path: Path, trusted: Collection[int], sticky_helps: bool, what: str) -> None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if status.st_uid not in trusted:
        _refuse(what, path, f"belongs to {_user(status.st_uid)}", f"chown {_user(os.geteuid())} {path}")
    if stat.S_ISLNK(status.st_mode) or (sticky_helps and status.st_mode & stat.S_ISVTX):
        return
    if status.st_mode & OTHERS_WRITE:
        _refuse(what, path, "can be written by everybody", f"chmod o-w {path}")
    if status.st_mode & GROUP_WRITES and (ACL in os.listxattr(path) or not _is_private(status.st_gid, trusted)):
        _refuse(what, path, f"can be written by group {status.st_gid}", f"chmod g-w {path}")


def _refuse(what: str, path: Path, why: str, remedy: str) -> None:
    raise PreflightError(f"{what} is not safe: {path} {why}, who could change it: run `{remedy}`")


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _is_private(gid: int, trusted: Collection[int]) -> bool:
    """Whether nobody else is in a group, as with a user's own, for which some systems let new files be writable."""
    try:
        members = grp.getgrgid(gid).gr_mem
    except KeyError:
        return False
    names = {_user(uid) for uid in trusted}
    return set(members) <= names and all(user.pw_uid in trusted for user in pwd.getpwall() if user.pw_gid == gid)
