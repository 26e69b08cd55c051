"""Children that are broken or taken over: what they send the supervisor is looked at before it is believed.

Each test writes into a real child's own end of its channel, of which it takes a copy with pidfd_getfd(2). The child is
killed and replaced, the log says what it sent, and the traffic goes on.

gen ──left── relay ──right── sink
"""

import ctypes
import os
import re
import signal
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from relay import framing
from relay.descriptors import PACKET_BYTES_MAX
from relay.messages import (
    ApplyRules,
    Done,
    Exited,
    GetStats,
    LogLevel,
    Ready,
    Refused,
    Spawned,
    Started,
    TableInUse,
    TemplateReady,
    ToControlPlane,
)
from relay.rules import RULES_MAX
from relay.supervisor.changes import WAITING_MAX
from relay.supervisor.stream import REQUEST_BYTES_MAX
from tests.system.conftest import StartRelay
from tests.system.harness import DEADLINE_S, Relay, assert_perfect, receiving, send, wait_until
from tools.netns import Line

SYS_PIDFD_GETFD = 438  # asm-generic/unistd.h
DATAGRAMS = 20_000
CONTROL_PLANE, TEMPLATE = "relay.controlplane", "relay.dataplane.template"
packed = msgspec.msgpack.encode
Send = Callable[[socket.socket], Any]


def taken(pid: int, descriptor: int) -> socket.socket:
    """A copy of another process's socket."""
    pidfd = os.pidfd_open(pid)
    try:
        copy = ctypes.CDLL(None, use_errno=True).syscall(SYS_PIDFD_GETFD, pidfd, descriptor, 0)
        assert copy >= 0, os.strerror(ctypes.get_errno())
        return socket.socket(fileno=copy)
    finally:
        os.close(pidfd)


def child(relay: Relay, module: str) -> psutil.Process:
    """The process that runs a module, once it is there."""

    def find() -> psutil.Process | None:
        running = [p for p in psutil.Process(relay.pid).children() if p.status() != psutil.STATUS_ZOMBIE]
        return next((process for process in running if module in process.cmdline()), None)

    found = wait_until(find, f"{module} runs")
    assert isinstance(found, psutil.Process)
    return found


def end_of(process: psutil.Process, option: str) -> socket.socket:
    """A copy of the end of a channel whose descriptor stands in the command line."""
    words = process.cmdline()
    return taken(process.pid, int(words[words.index(option) + 1]))


def end_of_worker(pid: int) -> socket.socket:
    """A copy of a worker's end of its channel: its only SOCK_SEQPACKET socket."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        if str(link.readlink()).startswith("socket:"):
            copy = taken(pid, int(link.name))
            if copy.type & socket.SOCK_SEQPACKET == socket.SOCK_SEQPACKET and copy.family == socket.AF_UNIX:
                return copy
            copy.close()
    raise AssertionError("a worker without a channel")


def running_worker(relay: Relay, other_than: int = 0) -> int:
    """The pid of the only worker, when it runs."""

    def find() -> int:
        (worker,) = relay.ask("list-workers")
        return int(worker["pid"]) if worker["state"] == "running" and worker["pid"] != other_than else 0

    return int(wait_until(find, "a worker runs"))


def told(relay: Relay, number: int, beginning: str) -> str:
    """What stands behind `beginning` in the supervisor's error of that number, which is the last."""
    pattern = re.compile(rf"^\[Error\] \[Supervisor\] {re.escape(beginning)}(.*)\n", re.MULTILINE)
    wait_until(lambda: len(pattern.findall(relay.text())) >= number, f"error {number}: {beginning}")
    lines = pattern.findall(relay.text())
    assert len(lines) == number
    return str(lines[-1])


def open_descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


@pytest.fixture
def relay(line: Line, start_relay: StartRelay) -> Relay:
    relay = start_relay(line.hosts[1], ("left",), 1, "--ring-mib", "64")
    relay.add("r1", "239.1.1.1:5001", "239.2.2.2:6001:right")
    return relay


@contextmanager
def unharmed_traffic(line: Line, folder: Path) -> Iterator[None]:
    """Traffic that passes meanwhile, of which nothing may be missing."""
    gen, _, sink = line.hosts
    with receiving(sink, folder, "--interface", "left") as summary:
        options = ("--interface", "right", "--rate", "5000", "--count", str(DATAGRAMS))
        sending = threading.Thread(target=send, args=(gen, *options))
        sending.start()
        try:
            yield
        finally:
            sending.join()
        assert_perfect(summary(DATAGRAMS), DATAGRAMS)


def with_descriptor(payload: bytes) -> Send:
    return lambda end: socket.send_fds(end, [payload], [0])


def bytes_of(payload: bytes) -> Send:
    return lambda end: end.send(payload)


OF_CONTROL_PLANE: list[tuple[bytes, str]] = [
    (framing.LENGTH.pack(3) + b"abc", "no valid message"),
    (framing.LENGTH.pack(REQUEST_BYTES_MAX + 1), "over the limit of"),
    (framing.encode(Done(1)), "Invalid value 'Done'"),
    (framing.encode(Ready()), "out of order: Ready"),
    (framing.encode(GetStats(-1)), ">= 0"),
    (framing.encode(ApplyRules(1, (), ("no such id",))), "matching regex"),
    (framing.encode(ApplyRules(1, (), ("r",) * (RULES_MAX + 1))), f"length <= {RULES_MAX}"),
    (framing.encode(LogLevel(1, "x" * 1000)), "length <= 32"),
]


def test_a_control_plane_that_sends_what_it_must_not_is_replaced(line: Line, relay: Relay, tmp_path: Path) -> None:
    with unharmed_traffic(line, tmp_path):
        for number, (payload, reason) in enumerate(OF_CONTROL_PLANE, 1):
            victim = child(relay, CONTROL_PLANE)
            with end_of(victim, "--supervisor-fd") as end:
                victim.suspend()
                end.setblocking(True)
                end.sendall(payload)
            wait_until(lambda: not victim.is_running(), "it is killed")  # noqa: B023
            relay.ask("ping")
            lines = re.findall(
                r"\[Error\] \[Supervisor\] Control plane sent what it must not, killed: (.*)", relay.text()
            )
            assert len(lines) == number
            assert reason in lines[-1]
        assert [rule["rule_id"] for rule in relay.ask("list-rules")] == ["r1"]
    relay.assert_accounted()
    relay.stop()


def test_requests_without_end_delay_nothing_else(line: Line, relay: Relay) -> None:
    """A worker is replaced while the control plane asks for statistics as fast as it can and reads none."""
    victim = child(relay, CONTROL_PLANE)
    worker = running_worker(relay)
    supervisor = psutil.Process(relay.pid)
    requests = framing.encode(GetStats(1)) * 1000
    flooding = threading.Event()
    with end_of(victim, "--supervisor-fd") as end:
        victim.suspend()
        end.settimeout(0.05)

        def flood() -> None:
            while not flooding.is_set():
                try:
                    end.send(requests)
                except TimeoutError:
                    continue
                except OSError:
                    return

        thread = threading.Thread(target=flood)
        thread.start()
        try:
            rss_before = supervisor.memory_info().rss
            descriptors = open_descriptors(relay.pid)
            os.kill(worker, signal.SIGKILL)
            relay.wait_for_log(f"pid {worker}, signal SIGKILL")
            wait_until(lambda: relay.text().count("Data plane worker started on core") == 2, "the worker is replaced")
            assert supervisor.memory_info().rss - rss_before < 16 << 20
            assert open_descriptors(relay.pid) <= descriptors + 4
        finally:
            flooding.set()
            thread.join()
            victim.kill()
    relay.ask("ping")
    relay.stop()


def test_changes_of_a_control_plane_that_does_not_wait_are_refused(relay: Relay) -> None:
    victim = child(relay, CONTROL_PLANE)
    changes = [ApplyRules(number, (), ("none",)) for number in range(5 * WAITING_MAX)]
    answers: dict[int, Any] = {}
    with end_of(victim, "--supervisor-fd") as end:
        victim.suspend()
        end.settimeout(DEADLINE_S)
        end.sendall(b"".join(framing.encode(change) for change in changes))
        buffer = framing.FrameBuffer(ToControlPlane)
        while len(answers) < len(changes):
            answers |= {answer.request_id: answer for answer in buffer.feed(end.recv(1 << 16))}
    kinds = Counter(type(answer).__name__ for answer in answers.values())
    assert kinds["Done"] >= WAITING_MAX
    assert {answer.error for answer in answers.values() if isinstance(answer, Refused)} == {
        "too many changes wait for their turn: try again"
    }
    victim.kill()
    assert [rule["rule_id"] for rule in relay.ask("list-rules")] == ["r1"]
    relay.stop()


def test_a_worker_that_sends_what_it_must_not_is_replaced(line: Line, relay: Relay, tmp_path: Path) -> None:
    cases: list[tuple[Send, str]] = [
        (bytes_of(b"rubbish"), ""),
        (bytes_of(b"x" * (PACKET_BYTES_MAX + 1)), f"a message over the limit of {PACKET_BYTES_MAX} bytes"),
        (with_descriptor(packed(TableInUse(1))), "descriptors that nobody asked for"),
        (bytes_of(packed(Started())), "out of order: Started"),
        (bytes_of(packed(TableInUse(1 << 40))), "out of order: TableInUse(generation=1099511627776)"),
        (bytes_of(packed(TableInUse(0))), "out of order: TableInUse(generation=0)"),
        (bytes_of(packed(TableInUse(-1))), ">= 0"),
        (bytes_of(packed(Exited(0, 1, 0))), "Invalid value 'Exited'"),
    ]
    with unharmed_traffic(line, tmp_path):
        for number, (misbehave, reason) in enumerate(cases, 1):
            worker = running_worker(relay)
            with end_of_worker(worker) as end:
                misbehave(end)
            running_worker(relay, other_than=worker)
            assert reason in told(relay, number, f"Worker on core {relay.cores(1)[0]} sent what it must not, killed: ")
        worker = running_worker(relay)
        with end_of_worker(worker) as end:
            end.send(b"")  # reads as the end of the channel, though the process lives
        running_worker(relay, other_than=worker)
    relay.stop()


def test_a_template_that_sends_what_it_must_not_is_replaced(line: Line, relay: Relay, tmp_path: Path) -> None:
    worker = running_worker(relay)
    core = relay.cores(1)[0]
    cases: list[tuple[Send, str]] = [
        (bytes_of(b"rubbish"), ""),
        (with_descriptor(packed(TemplateReady())), "descriptors that nobody asked for"),
        (bytes_of(packed(TemplateReady())), "out of order: TemplateReady"),
        (bytes_of(packed(Spawned(core, 1))), f"a worker that was not asked for: core {core}, pid 1"),
        (bytes_of(packed(Exited(core, worker, 9))), "an exit that did not happen"),
        (bytes_of(packed(Exited(900, worker, 9))), "core 900, which has no worker"),
        (bytes_of(packed(Exited(core, worker, 1 << 16))), "<= 65535"),
    ]
    with unharmed_traffic(line, tmp_path):
        for number, (misbehave, reason) in enumerate(cases, 1):
            victim = child(relay, TEMPLATE)
            with end_of(victim, "--fd") as end:
                misbehave(end)
            wait_until(lambda: not victim.is_running(), "it is killed")  # noqa: B023
            assert reason in told(relay, number, "Template sent what it must not, killed: ")
        assert running_worker(relay) == worker  # it never noticed
    os.kill(worker, signal.SIGKILL)  # a worker of a template that is gone: the next one forks its successor
    running_worker(relay, other_than=worker)
    relay.stop()


def test_a_pid_that_is_no_child_of_the_template_is_never_signalled(relay: Relay) -> None:
    worker, core = running_worker(relay), relay.cores(1)[0]
    bystander = subprocess.Popen(["sleep", "600"])
    victim = child(relay, TEMPLATE)
    try:
        with end_of(victim, "--fd") as end:
            victim.suspend()
            os.kill(worker, signal.SIGKILL)
            wait_until(lambda: psutil.Process(worker).status() == psutil.STATUS_ZOMBIE, "the worker has ended")
            end.send(packed(Exited(core, worker, 9)))
            wait_until(lambda: relay.text().count("Spawning Data Plane worker") == 2, "another one is asked for")
            end.send(packed(Spawned(core, bystander.pid)))
            wait_until(lambda: not victim.is_running(), "it is killed")
        running_worker(relay, other_than=worker)
        relay.wait_for_log(f"pid {bystander.pid} is a child of {os.getpid()}")
        relay.stop()
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_worker_whose_template_ends_before_it_could_tell_is_replaced(relay: Relay) -> None:
    worker = running_worker(relay)
    template = child(relay, TEMPLATE)
    template.suspend()
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: relay.ask("list-workers")[0]["state"] == "starting", "the supervisor hears no more of it")
    template.kill()
    running_worker(relay, other_than=worker)
    relay.stop()


def channels(pid: int) -> list[socket.socket]:
    """Copies of a process's ends of channels."""
    copies = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        if str(link.readlink()).startswith("socket:"):
            copy = taken(pid, int(link.name))
            is_channel = (copy.family, copy.type) == (socket.AF_UNIX, socket.SOCK_SEQPACKET)
            copies.append(copy) if is_channel else copy.close()
    return copies


def steal(ends: list[socket.socket], kinds: Sequence[type]) -> str:
    """Take a message of these types away if it is the next at one of the ends; return what was taken."""
    for end in ends:
        with suppress(OSError):  # nothing there, or a listening socket
            following = end.recv(PACKET_BYTES_MAX, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            for kind in kinds:
                if kind.__name__.encode() in following:
                    end.recv(PACKET_BYTES_MAX)
                    return kind.__name__
    return ""


def test_a_worker_that_its_template_did_not_live_to_tell_of_is_replaced(relay: Relay) -> None:
    """Nobody knows the pid of such a worker: it must get no ring, and not stand in the next one's way."""
    worker, core = running_worker(relay), relay.cores(1)[0]
    template, supervisor = child(relay, TEMPLATE), psutil.Process(relay.pid)
    with end_of(template, "--fd") as end:
        template.suspend()
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: psutil.Process(worker).status() == psutil.STATUS_ZOMBIE, "the worker has ended")
        end.send(packed(Exited(core, worker, 9)))
        wait_until(lambda: relay.text().count("Spawning Data Plane worker") == 2, "another one is asked for")
    supervisor.suspend()
    ends = channels(relay.pid)
    template.resume()
    wait_until(lambda: steal(ends, (Exited, Spawned)) == "Spawned", "a worker is forked")
    (untold,) = template.children()
    template.kill()
    wait_until(lambda: template.status() == psutil.STATUS_ZOMBIE, "the template has ended")
    for end in ends:
        end.close()
    supervisor.resume()
    assert running_worker(relay, other_than=worker) != untold.pid
    wait_until(lambda: not untold.is_running(), "it has ended")
    assert "sent what it must not" not in relay.text()
    relay.stop()


def test_a_worker_ended_by_a_signal_without_a_name_is_reported(relay: Relay) -> None:
    worker = running_worker(relay)
    os.kill(worker, 40)
    relay.wait_for_log(f"pid {worker}, signal 40")
    running_worker(relay, other_than=worker)
    relay.stop()
