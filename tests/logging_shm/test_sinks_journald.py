"""journald's native protocol, read by a parser of its own and by a real journald: each record is one entry.

The parser is fields(), from https://systemd.io/JOURNAL_NATIVE_PROTOCOL/. The real one has a /run of the test's:

    JournaldSink ─▶ RUN/systemd/journal/socket ─▶ systemd-journald ─▶ RUN/log/journal ─▶ journalctl
"""

import json
import os
import re
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from logging_shm import Facility, Severity
from logging_shm.sinks.journald import JournaldSink
from logging_shm.sinks.selection import Selection
from tests.logging_shm.sink_harness import Feed, until


def fields(datagram: bytes) -> dict[str, bytes]:
    """A datagram's fields: `NAME=value\\n`, or `NAME\\n`, a length of eight bytes, the value and `\\n`."""
    parsed: dict[str, bytes] = {}
    while datagram:
        line, newline, rest = datagram.partition(b"\n")
        assert newline
        name, equals, value = line.partition(b"=")
        if not equals:
            length = int.from_bytes(rest[:8], "little")
            value, rest = rest[8 : 8 + length], rest[8 + length :]
            assert rest.startswith(b"\n")
            rest = rest[1:]
        assert re.fullmatch(rb"[A-Z][A-Z0-9_]{0,63}", name)
        assert name.decode() not in parsed
        parsed[name.decode()] = value
        datagram = rest
    return parsed


class Journal:
    """A socket as journald has it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.settimeout(30)
        self._socket.bind(str(path))

    def entry(self) -> dict[str, bytes]:
        """The next entry."""
        return fields(self._socket.recv(65_536))

    def close(self) -> None:
        self._socket.close()
        self.path.unlink()


@pytest.fixture
def feed() -> Iterator[Feed]:
    with Feed(Facility.Egress, core=2) as feed:
        yield feed


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "socket")
    yield journal
    journal.close()


def test_an_entry_has_every_field_of_its_record(feed: Feed, journal: Journal) -> None:
    sink = JournaldSink(str(journal.path))
    feed.start(sink)
    feed.give(sink, "queue is full", severity=Severity.Critical, rule="tv", if_name="eth0")
    entry = journal.entry()
    assert int(entry.pop("MCR_TIMESTAMP_NS")) > 0
    assert entry == {
        "MESSAGE": b"queue is full",
        "PRIORITY": b"2",
        "SYSLOG_IDENTIFIER": b"mcr",
        "MCR_FACILITY": b"Egress",
        "MCR_CORE": b"2",
        "MCR_PID": str(os.getpid()).encode(),
        "MCR_TID": str(threading.get_native_id()).encode(),
        "MCR_SEQUENCE": b"0",
        "MCR_RULE": b"tv",
        "MCR_IF_NAME": b"eth0",
    }


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nPRIORITY=0", "a\\nPRIORITY=0"),
        ("a=b", "a=b"),
        ("漢字 é 🎉", "漢字 é 🎉"),
        ("", ""),
        ("x" * 170, "x" * 157 + "…"),
    ],
)
def test_no_text_can_end_its_field(feed: Feed, journal: Journal, text: str, shown: str) -> None:
    sink = JournaldSink(str(journal.path))
    feed.start(sink)
    feed.give(sink, text)
    entry = journal.entry()
    assert entry["MESSAGE"].decode() == shown
    assert entry["PRIORITY"] == b"6"


def test_a_key_becomes_a_name_that_journald_allows(feed: Feed, journal: Journal) -> None:
    sink = JournaldSink(str(journal.path))
    feed.start(sink)
    feed.ring.append(Severity.Info, "x", [("a-b\n=c", "v\nw")])
    feed.give(sink)
    assert journal.entry()["MCR_A_B__C"] == b"v\\nw"


def test_every_record_comes_once_and_in_order_also_when_the_socket_was_away(feed: Feed, journal: Journal) -> None:
    sink = JournaldSink(str(journal.path))
    feed.start(sink)
    feed.give(sink, "before")
    assert journal.entry()["MESSAGE"] == b"before"
    journal.close()
    feed.give(sink, *map(str, range(300)))
    until(lambda: feed.told_of(Severity.Error), "the error")
    journal.__init__(journal.path)  # type: ignore[misc]
    assert [int(journal.entry()["MESSAGE"]) for _ in range(300)] == list(range(300))
    until(lambda: feed.told_of(Severity.Notice), "the notice")
    assert (sink.written, sink.lost) == (301, 0)


def test_a_journal_that_reads_nothing_keeps_nobody_at_the_end_and_the_rest_is_counted(
    feed: Feed, journal: Journal
) -> None:
    sink = JournaldSink(str(journal.path))
    feed.start(sink)
    feed.give(sink, *["x"] * 4000)
    sink.close()
    assert sink.written + sink.lost == 4000
    assert sink.lost > 0


def test_only_what_was_selected_is_sent(feed: Feed, journal: Journal) -> None:
    sink = JournaldSink(str(journal.path), Selection(Severity.Warning, frozenset({Facility.Egress})))
    other = JournaldSink(str(journal.path), Selection(Severity.Debug, frozenset({Facility.Ingress})))
    feed.start(sink)
    feed.start(other)
    for severity in Severity:
        feed.give(sink, severity.name, severity=severity)
        feed.give(other, severity.name, severity=severity)
    shown = [journal.entry()["MESSAGE"].decode() for _ in range(5)]
    assert shown == ["Emergency", "Alert", "Critical", "Error", "Warning"]
    sink.close()
    other.close()
    assert (sink.written, sink.lost, other.written, other.lost) == (5, 0, 0, 0)


JOURNALD_CONF = "[Journal]\nStorage=volatile\nReadKMsg=no\nAudit=no\nForwardToSyslog=no\nRateLimitBurst=0\n"
# In a mount namespace of its own, so that it touches no other journal.
START_JOURNALD = """
mount --bind "$0" /run && mount --bind "$0/machine-id" /etc/machine-id && exec /lib/systemd/systemd-journald
"""


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[Path]:
    """What a real journald has as /run."""
    run = tmp_path / "run"
    (run / "systemd" / "journald.conf.d").mkdir(parents=True)
    (run / "log" / "journal").mkdir(parents=True)
    (run / "systemd" / "journald.conf.d" / "test.conf").write_text(JOURNALD_CONF)
    (run / "machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    daemon = subprocess.Popen(["unshare", "--mount", "--propagation", "private", "sh", "-c", START_JOURNALD, run])
    try:
        until((run / "systemd" / "journal" / "socket").exists, "journald's socket")
        yield run
    finally:
        daemon.terminate()
        daemon.wait()


def journalctl(run: Path, *matches: str) -> list[dict[str, str]]:
    """What a journal holds of such entries, oldest first."""
    command = ["journalctl", "-D", str(run / "log" / "journal"), "--quiet", "-o", "json", *matches]
    found = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return [json.loads(line) for line in found.stdout.splitlines()]


def test_a_real_journald_finds_entries_by_their_fields(feed: Feed, journald: Path) -> None:
    sink = JournaldSink(str(journald / "systemd" / "journal" / "socket"))
    feed.start(sink)
    feed.give(sink, "of another rule", rule="radio")
    feed.give(sink, 'é 漢字 "quoted"\nPRIORITY=0', severity=Severity.Warning, rule="tv")
    until(lambda: len(journalctl(journald, "MCR_FACILITY=Egress")) == 2, "both entries")
    (entry,) = journalctl(journald, "MCR_FACILITY=Egress", "MCR_RULE=tv")
    assert entry["MESSAGE"] == 'é 漢字 "quoted"\\nPRIORITY=0'
    assert (entry["PRIORITY"], entry["SYSLOG_IDENTIFIER"], entry["MCR_CORE"]) == ("4", "mcr", "2")
    assert entry["MCR_PID"] == entry["_PID"] == str(os.getpid())
