"""What a process that was taken over can't do: tried from inside, by each role after its real set-up.

test ── template ── worker          the test is the supervisor: it makes segments, spawns, and names an attempt
     └─ control plane
"""

import errno
import json
import os
import pwd
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from logging_shm import Facility, SharedMemoryLogManager, SharedSPSCRingBuffer
from logging_shm.facility import segment_name
from relay.confinement import landlock
from relay.dataplane import events
from relay.dataplane.copies import Copies
from relay.dataplane.counters import StatsSegment
from relay.descriptors import Channel, channel_pair
from relay.messages import Exited, FromTemplate, FromWorker, Leave, Spawn, Spawned, TemplateReady
from tools.environment import CHECKOUT

INSTANCE = f"confined{os.getpid()}"
NOBODY = pwd.getpwnam("nobody")
IS_ROOT = os.geteuid() == 0
OWNER = (NOBODY.pw_uid, NOBODY.pw_gid) if IS_ROOT else (os.geteuid(), os.getegid())
CORE, SIBLING = 0, 1  # of segments; workers are pinned to the first core that this process may use
START_S_MAX = 60.0
needs_landlock = pytest.mark.skipif(landlock.abi() == 0, reason="this kernel has no Landlock")

# What ends the process that tries it, in every role.
FATAL = (
    "open by openat2", "unlink", "make a socket", "make a socket pair", "execute", "make a thread", "unshare",
    "trace a sibling", "read a sibling's memory", "kill a sibling", "become dumpable", "make memory executable",
    "map executable memory", "call by x32", "call with another number",
)  # fmt: skip
FATAL_IN_STEADY_STATE = (
    "fork", "signal a sibling's thread", "change its limits", "shrink its segment", "punch a hole into its segment",
    "write to a descriptor", "set up another io_uring",
)  # fmt: skip
FATAL_IN_A_WORKER = ("register with its io_uring", "set another socket option")
REFUSED = ("open a file", "stat a file", "open a sibling's segment", "write to the code cache")
REFUSED_BY_IO_URING = ("open by io_uring", "make a socket by io_uring", "send with flags by io_uring")
POSSIBLE = ("nothing", "allocate", "report an error")


@pytest.fixture(scope="module")
def sibling() -> Iterator[int]:
    """Another process of the same user."""
    options: dict[str, Any] = {"user": OWNER[0], "group": OWNER[1], "extra_groups": []} if IS_ROOT else {}
    with subprocess.Popen(["sleep", "600"], **options) as process:
        yield process.pid
        assert process.poll() is None  # nothing that was tried ended it
        process.kill()


class Inside:
    """Starts a role and has it try something."""

    def __init__(self, role: str, folder: Path, sibling: int, segment_bytes: int, **environment: str) -> None:
        self.folder = folder
        self.errors = folder / f"{role}-errors"
        self.errors.touch()
        self.seen = 0
        self.command = [sys.executable, "-m", "tests.relay.intruder", role]
        self.environment = os.environ | environment
        self.environment |= {"INTRUDER_TARGET": str(sibling), "INTRUDER_SEGMENT_BYTES": str(segment_bytes)}
        self.environment["INTRUDER_SEGMENT"] = segment_name(Facility.Ingress, SIBLING, INSTANCE)

    def start(self, *arguments: str, descriptors: tuple[int, ...], **options: Any) -> "subprocess.Popen[bytes]":
        """Start the process as the supervisor does."""
        owner = ["--uid", str(OWNER[0]), "--gid", str(OWNER[1])]
        with self.errors.open("a") as out:
            return subprocess.Popen(
                [*self.command, *arguments, *owner],
                env=self.environment, stderr=out, cwd=CHECKOUT, pass_fds=descriptors, **options,
            )  # fmt: skip

    def said(self) -> Any:
        """What the attempt gave; None when it ended the process first."""
        text = self.errors.read_text()[self.seen :]
        self.seen += len(text)
        assert "trying\n" in text, text
        answers = [line for line in text.splitlines() if line.startswith('{"answer"')]
        return json.loads(answers[-1])["answer"] if answers else None


class Workers(Inside):
    """A template, and a worker for each attempt."""

    def __init__(self, folder: Path, sibling: int, role: str = "worker", **options: Any) -> None:
        environment = options.pop("environment", {})
        with SharedSPSCRingBuffer.attach(segment_name(Facility.Ingress, CORE, INSTANCE), {OWNER[0]}) as ring:
            super().__init__(role, folder, sibling, ring.segment.size, **environment)
        self.channel: Channel[FromTemplate]
        self.channel, far = channel_pair(FromTemplate, non_blocking=False)
        self.channel._socket.settimeout(START_S_MAX)
        with far, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as handover:
            handover.bind(str(folder / "handover"))
            handover.listen()
            descriptors = (far.fileno(), handover.fileno())
            arguments = ("--fd", str(descriptors[0]), "--handover-fd", str(descriptors[1]), "--heir-uid", "0")
            self.template = self.start(*arguments, descriptors=descriptors, **options)
        message, _ = self.channel.receive()
        assert isinstance(message, TemplateReady), self.errors.read_text()

    def attempt(self, name: str) -> tuple[int, Any]:
        """Have a new worker try; return its exit code, negative for a signal, and what the attempt gave."""
        channel: Channel[FromWorker]
        channel, far = channel_pair(FromWorker)
        with far, closing(Copies.create()) as copies:
            core = min(os.sched_getaffinity(0))
            assert core == CORE
            self.channel.send(Spawn(CORE, INSTANCE, "sleep"), [far.fileno(), copies.fileno()])
        channel._socket.send(name.encode())
        spawned, _ = self.channel.receive()
        exited, _ = self.channel.receive()
        channel.close()
        assert isinstance(spawned, Spawned)
        assert isinstance(exited, Exited)
        return os.waitstatus_to_exitcode(exited.status), self.said()

    def close(self) -> None:
        """End the template."""
        self.channel.send(Leave())
        self.channel.close()
        self.template.wait(START_S_MAX)


class ControlPlane(Inside):
    """A control plane for each attempt."""

    def attempt(self, name: str) -> tuple[int, Any]:
        """Have a new control plane try; return its exit code, and what the attempt gave."""
        path = self.folder / f"control-{len(list(self.folder.iterdir()))}"
        near, far = socket.socketpair()
        near.settimeout(START_S_MAX)
        with near, far, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            descriptors = (far.fileno(), listener.fileno())
            arguments = ("--supervisor-fd", str(descriptors[0]), "--listener-fd", str(descriptors[1]))
            process = self.start(*arguments, "--instance", INSTANCE, descriptors=descriptors)
            far.close()
            near.send(name.encode())
            near.shutdown(socket.SHUT_WR)
            return process.wait(START_S_MAX), self.said()


@pytest.fixture(scope="module")
def segments() -> Iterator[None]:
    """What the supervisor makes for two workers and a control plane."""
    with ExitStack() as stack:
        for core in (CORE, SIBLING):
            logs = SharedMemoryLogManager.create_for_worker(core, INSTANCE, *OWNER, formats=events.FORMATS)
            stack.enter_context(logs)
            stack.callback(StatsSegment.create(core, INSTANCE, *OWNER).close)
        name = segment_name(Facility.ControlPlane, instance=INSTANCE)
        uid, gid = OWNER
        stack.enter_context(
            SharedSPSCRingBuffer.create(name, facility=Facility.ControlPlane, uid=uid, gid=gid, instance=INSTANCE)
        )
        yield


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory, segments: None, sibling: int) -> Iterator[Workers]:
    """Confined as in a relay."""
    workers = Workers(tmp_path_factory.mktemp("workers"), sibling)
    yield workers
    workers.close()


@pytest.fixture
def control_plane(tmp_path: Path, segments: None, sibling: int) -> ControlPlane:
    """Confined as in a relay."""
    name = segment_name(Facility.ControlPlane, instance=INSTANCE)
    with SharedSPSCRingBuffer.attach(name, {OWNER[0]}) as ring:
        return ControlPlane("controlplane", tmp_path, sibling, ring.segment.size)


@pytest.mark.parametrize("name", [*FATAL, *FATAL_IN_STEADY_STATE, *FATAL_IN_A_WORKER])
def test_a_worker_that_tries_is_killed(workers: Workers, name: str) -> None:
    assert workers.attempt(name) == (-signal.SIGSYS, None)


@pytest.mark.parametrize("name", REFUSED)
def test_a_worker_opens_nothing(workers: Workers, name: str) -> None:
    assert workers.attempt(name) == (0, {"errno": errno.EACCES})


@pytest.mark.parametrize("name", REFUSED_BY_IO_URING)
def test_a_workers_io_uring_does_nothing_but_send(workers: Workers, name: str) -> None:
    assert workers.attempt(name) == (0, -errno.EACCES)


@pytest.mark.parametrize("name", POSSIBLE)
def test_a_worker_can_go_on_as_python_does(workers: Workers, name: str) -> None:
    code, answer = workers.attempt(name)
    assert code == 0
    assert answer is None if name == "nothing" else answer


def test_a_worker_that_aborts_is_not_taken_for_an_intruder(workers: Workers) -> None:
    assert workers.attempt("abort") == (-signal.SIGABRT, None)


@pytest.mark.parametrize("name", [*FATAL, *FATAL_IN_STEADY_STATE])
def test_a_control_plane_that_tries_is_killed(control_plane: ControlPlane, name: str) -> None:
    assert control_plane.attempt(name) == (-signal.SIGSYS, None)


@pytest.mark.parametrize("name", REFUSED)
def test_a_control_plane_opens_nothing(control_plane: ControlPlane, name: str) -> None:
    assert control_plane.attempt(name) == (0, {"errno": errno.EACCES})


@pytest.mark.parametrize("name", POSSIBLE)
def test_a_control_plane_can_go_on_as_python_does(control_plane: ControlPlane, name: str) -> None:
    code, answer = control_plane.attempt(name)
    assert code == 0
    assert answer is None if name == "nothing" else answer


def try_in_template(folder: Path, sibling: int, name: str) -> tuple[int, Any]:
    template = Workers(folder, sibling, "template")
    template.channel._socket.send(name.encode())
    return template.template.wait(START_S_MAX), template.said()


@pytest.mark.parametrize("name", FATAL[FATAL.index("make a socket") :])
def test_a_template_that_tries_is_killed(tmp_path: Path, segments: None, sibling: int, name: str) -> None:
    assert try_in_template(tmp_path, sibling, name) == (-signal.SIGSYS, None)


@needs_landlock
@pytest.mark.parametrize("name", ["open a file", "write to the code cache"])
def test_a_template_opens_nothing_but_segments(tmp_path: Path, segments: None, sibling: int, name: str) -> None:
    assert try_in_template(tmp_path, sibling, name) == (0, {"errno": errno.EACCES})


@pytest.mark.parametrize(
    "name",
    ["make a socket", "open a file", "open a sibling's segment", "fork", "signal a sibling's thread",
     "make memory executable", "map executable memory", "change its limits", "write to a descriptor"],
)  # fmt: skip
def test_the_attempts_succeed_where_nothing_confines(tmp_path: Path, segments: None, sibling: int, name: str) -> None:
    free = Workers(tmp_path, os.getpid() if "signal" in name else sibling, environment={"INTRUDER_UNCONFINED": "1"})
    try:
        code, answer = free.attempt(name)
    finally:
        free.close()
    assert code == 0
    assert answer == {"errno": errno.EPERM} if "signal" in name else "errno" not in str(answer)


@pytest.mark.skipif(not IS_ROOT, reason="becoming another user needs root")
@pytest.mark.parametrize("name", ["make a socket", "open a file", "trace a sibling", "shrink its segment"])
def test_what_was_never_root_is_confined_all_the_same(tmp_path: Path, segments: None, sibling: int, name: str) -> None:
    plain = Workers(tmp_path, sibling, environment={"INTRUDER_USER": str(OWNER[0])})
    try:
        status = Path(f"/proc/{plain.template.pid}/status").read_text()
        assert "CapPrm:\t0000000000000000\n" in status
        assert psutil.Process(plain.template.pid).uids().real == OWNER[0]
        expected = (0, {"errno": errno.EACCES}) if name in REFUSED else (-signal.SIGSYS, None)
        assert plain.attempt(name) == expected
    finally:
        plain.close()
