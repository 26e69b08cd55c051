"""Syslog, against a real rsyslogd: what it parses is what was written, over every transport, also after it was away.

SyslogSink, SyslogTcpSink ─▶ rsyslogd: imuxsock, imudp, imtcp ─▶ RFC 5424 parser, mmpstrucdata ─▶ JSON lines
"""

import itertools
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import pytest

from logging_shm import Facility, Severity
from logging_shm.sinks.base import Sink
from logging_shm.sinks.selection import Selection
from logging_shm.sinks.syslog import SyslogSink, SyslogTcpSink
from logging_shm.sinks.url import Described
from tests.logging_shm.sink_harness import Feed, free_port, until

CONFIGURATION = """
global(workDirectory="{directory}" maxMessageSize="64k")
module(load="imuxsock" SysSock.Use="off")
module(load="imudp")
module(load="imtcp")
module(load="mmpstrucdata")
input(type="imuxsock" Socket="{directory}/log" UseSpecialParser="off" ParseHostname="on" RateLimit.Interval="0")
input(type="imudp" Address="127.0.0.1" Port="{udp}")
input(type="imtcp" Address="127.0.0.1" Port="{tcp}")
template(name="fields" type="list") {{
    constant(value="{{")
    property(outname="pri" name="pri" format="jsonf")
    constant(value=",")
    property(outname="time" name="timereported" dateFormat="rfc3339" format="jsonf")
    constant(value=",")
    property(outname="host" name="hostname" format="jsonf")
    constant(value=",")
    property(outname="application" name="app-name" format="jsonf")
    constant(value=",")
    property(outname="process" name="procid" format="jsonf")
    constant(value=",")
    property(outname="id" name="msgid" format="jsonf")
    constant(value=",")
    property(outname="message" name="msg" format="jsonf")
    constant(value=",\\"data\\":")
    property(name="$!rfc5424-sd")
    constant(value="}}\\n")
}}
action(type="mmpstrucdata")
action(type="omfile" file="{directory}/out" template="fields")
"""
TEXTS = (
    "plain",
    'with "quotes", [brackets] and back\\slashes',
    "é, 漢字 and 🎉",
    ']" \\ <13>1 - - -',
    "no\nnew line",
)


class Rsyslogd:
    """A real rsyslogd with sockets and files of its own; can be killed and started again."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.udp, self.tcp = free_port(socket.SOCK_DGRAM), free_port(socket.SOCK_STREAM)
        self._process: subprocess.Popen[bytes] | None = None
        configuration = CONFIGURATION.format(directory=directory, udp=self.udp, tcp=self.tcp)
        (directory / "conf").write_text(configuration)

    def start(self) -> Self:
        """Start, and wait until every socket is open."""
        files = (str(self.directory / "conf"), "-i", str(self.directory / "pid"))
        self._process = subprocess.Popen(["rsyslogd", "-n", "-f", *files])
        until(self._is_open, "rsyslogd with open sockets")
        return self

    def _is_open(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None
        udp = f"0100007F:{self.udp:04X}"
        with socket.socket() as probe:
            is_listening = probe.connect_ex(("127.0.0.1", self.tcp)) == 0
        return is_listening and udp in Path("/proc/net/udp").read_text() and (self.directory / "log").exists()

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End it, and wait for that."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait()
            self._process = None

    def received(self) -> list[dict[str, Any]]:
        """What it has parsed and written so far."""
        out = self.directory / "out"
        # What stands behind the last end of a line is still being written.
        return [json.loads(line) for line in out.read_bytes().split(b"\n")[:-1]] if out.exists() else []

    def messages(self) -> list[str]:
        """The messages alone."""
        return [fields["message"] for fields in self.received()]


@pytest.fixture
def feed() -> Iterator[Feed]:
    with Feed(Facility.Ingress, core=3) as feed:
        yield feed


@pytest.fixture
def rsyslogd(tmp_path: Path) -> Iterator[Rsyslogd]:
    daemon = Rsyslogd(tmp_path)
    yield daemon
    daemon.stop()


def sink_to(rsyslogd: Rsyslogd, transport: str, query: str = "") -> Sink:
    urls = {
        "unix": f"syslog+unix:{rsyslogd.directory}/log",
        "udp": f"syslog+udp://127.0.0.1:{rsyslogd.udp}",
        "tcp": f"syslog+tcp://127.0.0.1:{rsyslogd.tcp}",
    }
    return Described(urls[transport] + query, Selection(host="relay7")).open()


@pytest.mark.parametrize("transport", ["unix", "udp", "tcp"])
def test_rsyslog_parses_every_field_that_was_written(rsyslogd: Rsyslogd, feed: Feed, transport: str) -> None:
    sink = sink_to(rsyslogd.start(), transport, "?syslog_facility=local2&application=mcr-b")
    feed.start(sink)
    before_s = time.time()
    feed.give(sink, "first packet", severity=Severity.Warning, rule='t"v]\\', from_="é")
    until(rsyslogd.received, "a message")
    (got,) = rsyslogd.received()
    assert int(got["pri"]) == 18 * 8 + Severity.Warning
    assert (got["host"], got["application"], got["id"]) == ("relay7", "mcr-b", "Ingress")
    assert (got["process"], got["message"]) == (str(os.getpid()), "first packet")
    assert before_s - 0.001 <= datetime.fromisoformat(got["time"]).timestamp() <= time.time()
    assert got["data"] == {
        "mcr@32473": {
            "tid": str(threading.get_native_id()), "seq": "0", "core": "3", "rule": 't"v]\\', "from_": "é",
        }
    }  # fmt: skip


@pytest.mark.parametrize("transport", ["unix", "udp", "tcp"])
def test_rsyslog_gets_messages_as_they_are(rsyslogd: Rsyslogd, feed: Feed, transport: str) -> None:
    sink = sink_to(rsyslogd.start(), transport)
    feed.start(sink)
    feed.give(sink, *TEXTS)
    until(lambda: len(rsyslogd.received()) == len(TEXTS), "all messages")
    assert rsyslogd.messages() == [text.replace("\n", "\\n") for text in TEXTS]
    assert (sink.written, sink.lost) == (len(TEXTS), 0)


@pytest.mark.parametrize("severity", list(Severity))
def test_severities_go_over_as_rfc_5424_numbers_them(feed: Feed, severity: Severity) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        sink = SyslogSink(receiver.getsockname())
        feed.start(sink)
        feed.give(sink, "x", severity=severity)
        receiver.settimeout(10)
        assert receiver.recv(1000).startswith(b"<%d>1 " % (3 * 8 + severity))


@pytest.mark.parametrize("transport", ["unix", "udp", "tcp"])
def test_a_receiver_that_comes_late_gets_every_message_once(rsyslogd: Rsyslogd, feed: Feed, transport: str) -> None:
    sink = sink_to(rsyslogd, transport)
    feed.start(sink)
    feed.give(sink, *map(str, range(100)))
    until(lambda: feed.told_of(Severity.Error), "the error")
    rsyslogd.start()
    until(lambda: feed.told_of(Severity.Notice), "the notice")
    until(lambda: len(rsyslogd.received()) >= 100, "all messages")
    assert rsyslogd.messages() == list(map(str, range(100)))
    assert (sink.written, sink.lost) == (100, 0)
    (error,), (notice,) = feed.told_of(Severity.Error), feed.told_of(Severity.Notice)
    assert "No such file" in error or "Connection refused" in error
    assert "works again after" in notice
    assert "0 lines lost" in notice


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("transport", ["unix", "udp", "tcp"])
def test_a_receiver_that_dies_and_comes_back_goes_on(
    rsyslogd: Rsyslogd, feed: Feed, transport: str, how: signal.Signals
) -> None:
    sink = sink_to(rsyslogd.start(), transport)
    feed.start(sink)
    feed.give(sink, "before")
    until(rsyslogd.received, "a message")
    rsyslogd.stop(how)
    feed.give(sink, "meanwhile")
    until(lambda: feed.told_of(Severity.Error), "the error")
    (rsyslogd.directory / "pid").unlink(missing_ok=True)
    rsyslogd.start()
    until(lambda: feed.told_of(Severity.Notice), "the notice")
    feed.give(sink, "after")
    until(lambda: "after" in rsyslogd.messages(), "the last message")
    assert rsyslogd.messages() == ["before", "meanwhile", "after"]
    assert (sink.written, sink.lost) == (3, 0)


def test_a_tcp_receiver_that_came_back_while_nothing_was_sent_is_not_even_noticed(
    rsyslogd: Rsyslogd, feed: Feed
) -> None:
    sink = sink_to(rsyslogd.start(), "tcp")
    feed.start(sink)
    feed.give(sink, "before")
    until(rsyslogd.received, "a message")
    rsyslogd.stop()
    rsyslogd.start()
    feed.give(sink, "after")
    until(lambda: len(rsyslogd.received()) == 2, "the second message")
    assert feed.told == []


def test_a_dead_udp_receiver_is_told_once_not_at_every_try(feed: Feed) -> None:
    sink = SyslogSink(("127.0.0.1", free_port(socket.SOCK_DGRAM)))
    tries = count_calls(sink)
    feed.start(sink)
    feed.give(sink, "one", "two", "three")
    until(lambda: len(tries) >= 4, "four tries")
    assert [severity for severity, _ in feed.told] == [Severity.Error]
    assert sink.written == 0


def count_calls(sink: Sink) -> list[float]:
    """When `deliver` was called."""
    calls: list[float] = []
    deliver = sink.deliver

    def counted(chunk: Any) -> None:
        calls.append(time.monotonic())
        deliver(chunk)

    sink.deliver = counted  # type: ignore[method-assign]
    return calls


def test_a_failed_sink_tries_again_ever_less_often_however_much_it_is_given(feed: Feed) -> None:
    sink = SyslogTcpSink(("127.0.0.1", free_port(socket.SOCK_STREAM)))
    tries = count_calls(sink)
    feed.start(sink)
    feed.give(sink, "first")
    until(lambda: tries, "the first try")
    given = 1
    while len(tries) < 5:
        feed.give(sink, "more")
        given += 1
        assert given < 1_000_000
    pauses_s = [after - before for before, after in itertools.pairwise(tries)]
    assert all(pause_s >= least_s for pause_s, least_s in zip(pauses_s, (0.1, 0.2, 0.4, 0.8), strict=True))
    sink.close()
    assert (sink.written, sink.lost) == (0, given)


class TcpReceiver:
    """A TCP receiver that reads frames by octet counting, of as many connections as come, when it is told to."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(30)
        self.address = self._listener.getsockname()

    def accept(self) -> socket.socket:
        connection, _ = self._listener.accept()
        connection.settimeout(30)
        return connection

    @staticmethod
    def frames(connection: socket.socket, count: int) -> list[str]:
        """The texts of the next frames."""
        texts = []
        with connection.makefile("rb", buffering=0) as stream:
            for _ in range(count):
                length = b""
                while (digit := stream.read(1)) != b" ":
                    assert digit is not None
                    assert digit.isdigit()
                    length += digit
                body = b""
                while len(body) < int(length):
                    piece = stream.read(int(length) - len(body))
                    assert piece
                    body += piece
                texts.append(body.decode().rpartition("] ")[2])
        return texts

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()


def test_what_a_tcp_peer_took_is_not_sent_again_after_it_closed(feed: Feed) -> None:
    with TcpReceiver() as receiver:
        sink = SyslogTcpSink(receiver.address)
        feed.start(sink)
        feed.give(sink, "one", "two")
        with receiver.accept() as first:
            assert receiver.frames(first, 2) == ["one", "two"]
            until(lambda: sink.written == 2, "the acknowledgement")
        feed.give(sink, "three")
        with receiver.accept() as second:
            assert receiver.frames(second, 1) == ["three"]
            until(lambda: sink.written == 3, "the acknowledgement")
    assert feed.told == []


def test_what_a_tcp_peer_did_not_take_is_sent_again_in_whole_frames(feed: Feed) -> None:
    # Small buffers: the batch is more than both take.
    with TcpReceiver() as receiver:
        receiver._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sink = SyslogTcpSink(receiver.address)
        texts = [f"{number} {'x' * 140}" for number in range(4000)]
        feed.start(sink)
        for at in range(0, 4000, 500):
            feed.give(sink, *texts[at : at + 500])
        with receiver.accept() as first:
            taken = receiver.frames(first, 10)
            first.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        got: list[str] = []
        with receiver.accept() as second:
            while not got or got[-1] != texts[-1]:
                got += receiver.frames(second, 1)
            until(lambda: sink.written == 4000, "the acknowledgements")
    assert taken == texts[:10]
    # What the first connection's kernel had acknowledged and nobody read is lost; nothing else is.
    assert got == texts[-len(got) :]
    assert len(got) > 2000
    assert sink.lost == 0
    assert [severity for severity, _ in feed.told] == [Severity.Error, Severity.Notice]


def test_a_tcp_peer_that_never_reads_delays_nobody_and_the_rest_is_counted_as_lost(feed: Feed) -> None:
    with TcpReceiver() as receiver, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        receiver._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        other.bind(("127.0.0.1", 0))
        other.settimeout(30)
        stuck, working = SyslogTcpSink(receiver.address), SyslogSink(other.getsockname())
        feed.start(stuck)
        feed.start(working)
        for _ in range(20):
            feed.give(stuck, *["x" * 150] * 1000)
        feed.give(working, "goes through")
        assert other.recv(1000).endswith(b"] goes through")
        stuck.close()
        assert stuck.written + stuck.lost == 20_000
        assert stuck.lost > 0
