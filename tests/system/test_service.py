"""What a service manager is told by a live supervisor, over a datagram socket as systemd's."""

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay import AsyncClient, WorkerStats
from tests.system.conftest import StartRelay
from tests.system.harness import wait_until
from tools.netns import Host

WATCHDOG_USEC = 100_000
READ_S = 0.05

Message = dict[str, str]


class Manager:
    """Reads what comes, while in `reading`."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.messages: list[Message] = []
        sock.settimeout(READ_S)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """A thread reads in the block."""
        ended = threading.Event()

        def read() -> None:
            while not ended.is_set():
                with contextlib.suppress(TimeoutError):
                    lines = self.socket.recv(65536).decode().splitlines()
                    self.messages.append(dict(line.split("=", 1) for line in lines))

        thread = threading.Thread(target=read)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def changes(self) -> list[Message]:
        """What was told of changes of state, in order."""
        return [message for message in self.messages if message.keys() & {"READY", "RELOADING", "STOPPING"}]

    def wait_for(self, *keys: str) -> Message:
        """Wait until these and no others were told of; return the last message."""
        wait_until(lambda: len(self.changes()) >= len(keys), f"{keys} are told")
        assert [next(iter(message)) for message in self.changes()] == list(keys)
        return self.changes()[-1]

    def wait_for_beats(self, count: int) -> None:
        """Wait for so many more signs of life."""
        before = self.messages.count({"WATCHDOG": "1"})
        wait_until(lambda: self.messages.count({"WATCHDOG": "1"}) >= before + count, f"{count} signs of life")


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    """Whom the relay of this test reports to."""
    name = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(name)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        monkeypatch.setenv("WATCHDOG_USEC", str(WATCHDOG_USEC))
        yield Manager(sock)


async def restart(control_socket: Path) -> tuple[list[WorkerStats], int]:
    """By the client for asyncio, as mcrctl uses the other one: the worker before and after, and how many there were."""
    async with AsyncClient(control_socket) as client:
        before = await client.workers()
        count = await client.restart()
        return before + await client.workers(), count


def test_a_manager_is_told_everything_from_start_to_end(manager: Manager, start_relay: StartRelay) -> None:
    with Host("service") as host, manager.reading():
        relay = start_relay(host, ("lo",))
        ready = manager.wait_for("READY")
        assert ready == {"READY": "1", "STATUS": "0 rules, 1 worker, 0 packets/s, 0 bit/s"}
        manager.wait_for_beats(3)
        relay.add("tv", "239.1.1.1:5001", "239.2.2.2:6001:lo")
        relay.process.send_signal(signal.SIGHUP)
        manager.wait_for("READY", "RELOADING", "READY")
        assert int(manager.changes()[1]["MONOTONIC_USEC"]) > 0
        (former, worker), count = asyncio.run(restart(relay.socket))
        assert (count, worker.state, worker.pid != former.pid) == (1, "running", True)
        started_anew = manager.wait_for("READY", "RELOADING", "READY", "RELOADING", "READY")
        assert started_anew["STATUS"].startswith("1 rule, 1 worker, ")
        manager.wait_for_beats(3)
        relay.wait_for_log("Took over from supervisor")
        relay.stop()
        manager.wait_for("READY", "RELOADING", "READY", "RELOADING", "READY", "STOPPING")


def test_a_manager_that_reads_nothing_or_goes_stops_no_relay(manager: Manager, start_relay: StartRelay) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as filler, Host("service") as host:
        filler.setblocking(False)
        with contextlib.suppress(BlockingIOError):  # its queue is full: net.unix.max_dgram_qlen
            for _ in range(100_000):
                filler.sendto(b"STATUS=full", manager.socket.getsockname())
            pytest.fail("the queue never filled up")
        relay = start_relay(host, ("lo",))
        relay.add("tv", "239.1.1.1:5001", "239.2.2.2:6001:lo")
        with manager.reading():
            manager.wait_for("READY")  # what found no room is told later
            manager.wait_for_beats(3)
        manager.socket.close()
        relay.ask("remove-rule", "tv")
        relay.stop()
