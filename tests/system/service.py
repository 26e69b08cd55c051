"""Runs a command as `packaging/systemd/mcr.service` has it run, where no systemd is: `python -m tests.system.service`.

As a user who is not root, with the unit's capabilities as ambient ones and its bounding set; without new privileges;
privileged system calls refused with EPERM; /proc without what may not be traced. In a mount namespace of its own, where
Python can be read by everybody.
"""

import ctypes
import errno
import os
import pwd
import re
import sys
import tempfile
from pathlib import Path

from relay.confinement import capabilities, seccomp
from relay.confinement.capabilities import prctl
from tools.environment import CHECKOUT

UNIT = CHECKOUT / "packaging" / "systemd" / "mcr.service"
CLONE_NEWNS = 0x0002_0000
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 0x20, 0x1000, 0x4000, 0x4_0000
PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS = 8, 38
OTHERS_ENTER = 0o001
# Of @privileged, what Python programs might use.
PRIVILEGED = {
    "x86_64": {"chown": 92, "fchown": 93, "lchown": 94, "fchownat": 260, "setuid": 105, "setgroups": 116,
               "setresuid": 117, "setresgid": 119, "capset": 126, "chroot": 161, "bpf": 321},
    "aarch64": {"fchown": 55, "fchownat": 54, "setuid": 146, "setgroups": 159, "setresuid": 147, "setresgid": 149,
                "capset": 91, "chroot": 51, "bpf": 280},
}  # fmt: skip
libc = ctypes.CDLL(None, use_errno=True)


def check(result: int) -> None:
    """Raise the error of a C call."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def mount(source: str, target: Path, kind: str, flags: int, options: str = "") -> None:
    """man 2 mount. Raises OSError."""
    check(libc.mount(source.encode(), str(target).encode(), kind.encode(), ctypes.c_ulong(flags), options.encode()))


def let_everybody_read(path: Path) -> None:
    """Hide a directory that only root may enter behind another one with the same single way in it."""
    shut = [parent for parent in reversed(path.parents) if not parent.stat().st_mode & OTHERS_ENTER]
    if not shut:
        return
    with tempfile.TemporaryDirectory() as held:
        mount(str(path), Path(held), "", MS_BIND | MS_REC)
        mount("none", shut[0], "tmpfs", 0, "mode=755")
        path.mkdir(parents=True)
        mount(held, path, "", MS_BIND | MS_REC)
        check(libc.umount2(held.encode(), 2))


def refuse_privileged_calls() -> None:
    """As SystemCallFilter=~@privileged with SystemCallErrorNumber=EPERM."""
    machine = os.uname().machine
    refuse = (seccomp.RET_K, 0, 0, seccomp.SECCOMP_RET_ERRNO | errno.EPERM)
    program = [(seccomp.LD_WORD_ABS, 0, 0, seccomp.NR_OFFSET)]
    for number in PRIVILEGED[machine].values():
        program += [(seccomp.JEQ_K, 0, 1, number), refuse]
    program.append((seccomp.RET_K, 0, 0, seccomp.SECCOMP_RET_ALLOW))
    code = ctypes.create_string_buffer(seccomp.encode(program))

    class SockFprog(ctypes.Structure):
        _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    fprog = SockFprog(len(program), ctypes.addressof(code))
    prctl(seccomp.PR_SET_SECCOMP, seccomp.SECCOMP_MODE_FILTER, ctypes.addressof(fprog))


def unit_capabilities() -> set[int]:
    """The bounding set that the unit gives, which is its ambient set as well."""
    lines = dict(re.findall(r"^(CapabilityBoundingSet|AmbientCapabilities)=(.*)$", UNIT.read_text(), re.MULTILINE))
    assert lines["CapabilityBoundingSet"] == lines["AmbientCapabilities"]
    return {int(capabilities.Capability[name]) for name in lines["AmbientCapabilities"].split()}


def main() -> None:
    """Become the command, as the user named first."""
    user = pwd.getpwnam(sys.argv[1])
    kept = unit_capabilities()
    check(libc.unshare(CLONE_NEWNS))
    mount("none", Path("/"), "", MS_REC | MS_PRIVATE)
    let_everybody_read(Path(sys.base_prefix))
    mount("proc", Path("/proc"), "proc", 0, "hidepid=invisible")
    capabilities.bound_to(kept)
    prctl(PR_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
    os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)
    capabilities.keep_only(kept)
    capabilities.pass_on()
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    refuse_privileged_calls()
    os.execv(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
