"""What a template does without a supervisor: it keeps what it was given, for the next one, and not for ever."""

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.dataplane import template
from relay.dataplane.template import Template
from relay.descriptors import Channel, channel_pair
from relay.messages import Forget, FromOrphans, FromTemplate, Keep, Kept, KeptAll, Leave, TemplateReady, ToTemplate

JOIN_S = 60.0


class Running:
    """A template in a thread, with a channel to its supervisor and a hand-over socket. It has no worker."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "handover"
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(str(self.path))
        self.listener.listen(1)
        self.supervisor: Channel[FromTemplate]
        self.supervisor, self.far = channel_pair(FromTemplate)
        self.wakeup, self.signalled = socket.socketpair()
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        channel: Channel[ToTemplate] = Channel(self.far, ToTemplate)
        serving = Template(channel, self.listener, os.geteuid())
        self.thread = threading.Thread(target=serving.run, args=(self.wakeup,))
        self.thread.start()

    def ends(self) -> bool:
        assert self.thread is not None
        self.thread.join(JOIN_S)
        return not self.thread.is_alive()

    def close(self) -> None:
        self.supervisor.close()
        for sock in (self.listener, self.far, self.wakeup, self.signalled):
            sock.close()


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setattr(template, "LINGER_S", 0.05)
    running = Running(tmp_path)
    try:
        yield running
    finally:
        running.close()


def test_what_a_supervisor_sent_before_it_died_is_kept_though_it_read_nothing(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It died while the template loaded: what it had not read is told to the template as a reset, and only once."""
    monkeypatch.setattr(template, "LINGER_S", JOIN_S)
    names = tuple(f"file-{number}" for number in range(100))
    with open(os.devnull) as file:  # noqa: PTH123
        for name in names:
            running.supervisor.send(Keep((name,)), [file.fileno()])
        running.supervisor.send(Forget(names[:1]))
        identity = os.fstat(file.fileno())
    Channel(running.far, ToTemplate).send(TemplateReady())
    running.supervisor.close()
    running.start()
    end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    end.connect(str(running.path))
    heir: Channel[FromOrphans] = Channel(end, FromOrphans)
    message, descriptors = heir.receive()
    assert isinstance(message, Kept)
    assert message.names == names[1:]
    assert all(os.path.samestat(os.fstat(descriptor), identity) for descriptor in descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    assert isinstance(heir.receive()[0], KeptAll)
    heir.send(Leave())
    assert running.ends()
    heir.close()


def test_a_template_without_supervisor_and_workers_ends_when_nobody_comes(running: Running) -> None:
    with open(os.devnull) as file:  # noqa: PTH123
        running.supervisor.send(Keep(("file",)), [file.fileno()])
    running.start()
    running.supervisor.close()
    assert running.ends()


def test_a_template_that_keeps_nothing_ends_with_its_supervisor(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template, "LINGER_S", 10 * JOIN_S)
    running.start()
    running.supervisor.close()
    assert running.ends()
