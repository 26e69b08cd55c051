"""The filters, run by a slow, obvious interpreter; call numbers and structures as in the kernel's headers."""

import ctypes
import errno
import os
import re
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.bpf import BPF_MAXINSNS
from relay.confinement import seccomp
from relay.confinement.capabilities import AT_START, SUPERVISOR, Capability
from relay.confinement.landlock import (
    FS_RIGHTS,
    LANDLOCK_ACCESS_NET,
    READ,
    READ_AND_WRITE,
    PathBeneathAttr,
    RulesetAttr,
    abi,
)
from relay.confinement.seccomp import ARCHITECTURES, CONTROL_PLANE, EACCES, TEMPLATE, WORKER, assemble, of_process
from tools.environment import CHECKOUT

POLICIES = {"control plane": CONTROL_PLANE, "worker": WORKER, "template": TEMPLATE}
KILL, ALLOW = seccomp.SECCOMP_RET_KILL_PROCESS, seccomp.SECCOMP_RET_ALLOW
PROT_EXEC, STDERR = 4, 2
PID = 4711
HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}


def run(program: list[seccomp.Instruction], number: int, architecture: int, arguments: tuple[int, ...]) -> int:
    """The verdict of a filter on a call. Loads are native words, as seccomp's are."""
    data = struct.pack("=iIQ6Q", number, architecture, 0, *arguments)
    a = at = 0
    while True:
        code, jt, jf, k = program[at]
        at += 1
        if code == seccomp.LD_WORD_ABS:
            (a,) = struct.unpack_from("=I", data, k)
        elif code == seccomp.RET_K:
            return k
        else:
            truth = {seccomp.JEQ_K: a == k, seccomp.JGE_K: a >= k, seccomp.JSET_K: bool(a & k)}[code]
            at += jt if truth else jf


def expected(policy: seccomp.Policy, name: str | None, arguments: tuple[int, ...]) -> int:
    """The verdict as the lists say it."""
    if name is None or name not in policy:
        return EACCES if name in seccomp.REFUSED else KILL
    for check in policy[name]:
        value = arguments[check.argument] & 0xFFFF_FFFF
        if (check.without and value & check.without) or (check.values and value not in check.values):
            return check.otherwise
    return ALLOW


@pytest.mark.parametrize("machine", ARCHITECTURES)
@pytest.mark.parametrize("role", POLICIES)
@given(data=st.data())
def test_a_filter_says_what_its_list_says(machine: str, role: str, data: st.DataObject) -> None:
    policy = of_process(POLICIES[role], PID)
    architecture, numbers = ARCHITECTURES[machine]
    names = {number: name for name, number in numbers.items()}
    number = data.draw(st.one_of(st.sampled_from(sorted(names)), st.integers(0, 0x7FFF_FFFF)))
    values = {value for checks in policy.values() for check in checks for value in (*check.values, check.without)}
    argument = st.one_of(st.sampled_from(sorted(values)), st.integers(0, (1 << 64) - 1))
    arguments = data.draw(st.tuples(*[argument] * 6))
    verdict = run(assemble(policy, machine), number, architecture, arguments)
    assert verdict == expected(policy, names.get(number), arguments)


@pytest.mark.parametrize("machine", ARCHITECTURES)
@pytest.mark.parametrize("role", POLICIES)
def test_another_architecture_and_x32_are_killed(machine: str, role: str) -> None:
    architecture, numbers = ARCHITECTURES[machine]
    program = assemble(POLICIES[role], machine)
    assert run(program, numbers["getpid"], architecture, (0,) * 6) == ALLOW
    assert run(program, numbers["getpid"] | 0x4000_0000, architecture, (0,) * 6) == KILL
    for other in (0x4000_0003, 0x4000_0028, 0xC000_003E ^ 0xC000_00B7 ^ architecture):  # i386, ARM, the other one
        assert run(program, numbers["getpid"], other, (0,) * 6) == KILL


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_what_the_loop_calls_passes_by_its_number_alone(machine: str) -> None:
    # For these the kernel answers from a bitmap and runs no filter.
    loop = {"io_uring_enter", "clock_nanosleep", "recvmmsg", "getsockopt", "poll", "ppoll"}
    for policy in (WORKER, TEMPLATE):  # a worker has both
        assert [name for name in loop & set(ARCHITECTURES[machine][1]) if policy[name]] == []


@pytest.mark.parametrize("role", POLICIES)
def test_a_filter_is_not_longer_than_the_kernel_takes(role: str) -> None:
    assert all(len(assemble(POLICIES[role], machine)) <= BPF_MAXINSNS for machine in ARCHITECTURES)


def test_a_worker_needs_nothing_that_its_template_lacks() -> None:
    assert set(WORKER) <= set(TEMPLATE)


@pytest.mark.parametrize("name", ["ftruncate", "fallocate", "socket", "connect", "execve", "ptrace", "kill", "bpf"])
def test_no_list_has(name: str) -> None:
    assert all(name not in policy for policy in POLICIES.values())


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_numbers_are_the_kernels(machine: str) -> None:
    if not HEADERS[machine].exists():
        pytest.skip(f"no {HEADERS[machine]}")
    text = HEADERS[machine].read_text()
    found = {m[1]: int(m[2]) for m in re.finditer(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)}
    found.setdefault("newfstatat", found.get("fstatat", -1))  # __NR_newfstatat is __NR3264_fstatat on 64 bits
    numbers = ARCHITECTURES[machine][1]
    assert numbers == {name: found.get(name) for name in numbers}


def row(name: str) -> list[str]:
    """The cells of a row of the table in docs/security.md."""
    text = (CHECKOUT / "docs" / "security.md").read_text()
    return next(line for line in text.splitlines() if line.startswith(f"| {name}")).strip("| ").split(" | ")


def test_the_documentation_tells_what_is_allowed() -> None:
    numbers = ARCHITECTURES["x86_64"][1]
    policies = (of_process(CONTROL_PLANE, PID), TEMPLATE, of_process(WORKER, PID))
    counts = [str(len([name for name in policy if name in numbers])) for policy in policies]
    assert row("system calls (seccomp)") == ["system calls (seccomp)", "all", *counts]
    kept = {name.removeprefix("CAP_") for name in (Capability(number).name for number in SUPERVISOR)}
    bound = {name.removeprefix("CAP_") for name in (Capability(number).name for number in AT_START)}
    assert set(re.findall(r"`(\w+)`", row("permitted and effective")[1])) == kept
    assert set(re.findall(r"`(\w+)`", row("bounding set")[1])) == bound - kept


STRUCTURES = r"""
#include <linux/audit.h>
#include <linux/landlock.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
int main(void) {
    printf("%zu %zu %zu ", offsetof(struct seccomp_data, nr), offsetof(struct seccomp_data, arch),
           offsetof(struct seccomp_data, args));
    printf("%u %u ", AUDIT_ARCH_X86_64, AUDIT_ARCH_AARCH64);
    printf("%u %u ", SECCOMP_RET_KILL_PROCESS, SECCOMP_RET_ALLOW);
    printf("%zu %zu ", sizeof(struct landlock_path_beneath_attr),
           offsetof(struct landlock_path_beneath_attr, parent_fd));
    printf("%zu %u %u ", offsetof(struct landlock_ruleset_attr, handled_access_fs),
           (unsigned)LANDLOCK_ACCESS_FS_READ_FILE, (unsigned)LANDLOCK_ACCESS_FS_WRITE_FILE);
    return 0;
}
"""


def test_structures_are_the_kernels(tmp_path: Path) -> None:
    source, program = tmp_path / "print.c", tmp_path / "print"
    source.write_text(STRUCTURES)
    subprocess.run(["cc", "-o", program, source], check=True)
    printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    assert [int(word) for word in printed.split()] == [
        seccomp.NR_OFFSET, seccomp.ARCH_OFFSET, seccomp.ARGUMENTS_OFFSET,
        ARCHITECTURES["x86_64"][0], ARCHITECTURES["aarch64"][0],
        KILL, ALLOW,
        ctypes.sizeof(PathBeneathAttr), PathBeneathAttr.parent_fd.offset,
        RulesetAttr.handled_access_fs.offset, READ, READ_AND_WRITE - READ,
    ]  # fmt: skip


def test_rights_of_landlock_are_what_its_documentation_counts() -> None:
    # ABI 1 has execute … make_sym, 2 adds refer, 3 truncate, 5 ioctl_dev; 6 and 7 add none for files.
    assert FS_RIGHTS == {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
    assert LANDLOCK_ACCESS_NET == 3  # bind_tcp, connect_tcp
    assert ctypes.sizeof(RulesetAttr) == 24
    assert (RulesetAttr.handled_access_net.offset, RulesetAttr.scoped.offset) == (8, 16)


ALONE = """
import errno, os, signal, socket, sys
from pathlib import Path
from relay.confinement import landlock
from relay.confinement.capabilities import prctl
folder, port, sibling = Path(sys.argv[1]), int(sys.argv[2]), os.getppid()
def outcome(what):
    try:
        what()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"
def connect():
    with socket.socket() as sock:
        sock.connect(("127.0.0.1", port))
def abstract():
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect("\\0mcr-landlock-test-%d" % sibling)
attempts = {
    "read": lambda: (folder / "open" / "file").read_bytes(),
    "write": lambda: os.close(os.open(folder / "open" / "file", os.O_WRONLY)),
    "truncate": lambda: os.truncate(folder / "open" / "file", 0),
    "create": lambda: (folder / "open" / "new").touch(),
    "read outside": lambda: (folder / "shut").read_bytes(),
    "connect": connect,
    "abstract": abstract,
    "signal": lambda: os.kill(sibling, 0),
}
prctl(38, 1)
before = [outcome(what) for what in attempts.values()]
(folder / "open" / "new").unlink()
assert landlock.restrict({folder / "open": landlock.READ_AND_WRITE})
print(*before)
print(*[outcome(what) for what in attempts.values()])
"""


@pytest.mark.skipif(abi() < 6, reason="this kernel's Landlock is older, or there is none")
def test_landlock_alone_leaves_what_it_is_told_to(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "file").touch()
    (tmp_path / "shut").touch()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0mcr-landlock-test-{os.getpid()}")
        abstract.listen()
        command = [sys.executable, "-c", ALONE, str(tmp_path), str(server.getsockname()[1])]
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=CHECKOUT)
    assert result.returncode == 0, result.stderr
    before, after = (line.split() for line in result.stdout.splitlines())
    assert before == ["done"] * 8
    denied = errno.errorcode[errno.EACCES]
    assert after == ["done", "done", denied, denied, denied, denied, errno.errorcode[errno.EPERM], "EPERM"]
