"""URLs of sinks: what they describe, and that every refusal names the part and what is allowed."""

import socket
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from logging_shm import Facility, Severity
from logging_shm.sinks.file import FileSink
from logging_shm.sinks.journald import JournaldSink
from logging_shm.sinks.selection import Selection, SinkError
from logging_shm.sinks.stream import StreamSink
from logging_shm.sinks.syslog import SyslogSink, SyslogTcpSink
from logging_shm.sinks.url import SHAPES, Described
from tests.logging_shm.sink_harness import Feed

SCHEMES_ALLOWED = "expected one of stdout:, file:, syslog+udp:, syslog+tcp:, syslog+unix:, journald:"

LEVELS_ALLOWED = "emergency, alert, critical, error, warning, notice, info, debug"


@pytest.mark.parametrize(
    ("url", "kind", "name"),
    [
        ("stdout:", StreamSink, "stdout"),
        ("syslog+udp://10.0.0.1", SyslogSink, "syslog 10.0.0.1:514"),
        ("syslog+udp://log.example.org:1514", SyslogSink, "syslog log.example.org:1514"),
        ("syslog+udp://[2001:db8::1]:1514", SyslogSink, "syslog 2001:db8::1:1514"),
        ("syslog+tcp://10.0.0.1", SyslogTcpSink, "syslog tcp 10.0.0.1:601"),
        ("syslog+tcp://[fe80::1%eth0]:65535", SyslogTcpSink, "syslog tcp fe80::1%eth0:65535"),
        ("syslog+unix:", SyslogSink, "syslog /dev/log"),
        ("syslog+unix:/run/log", SyslogSink, "syslog /run/log"),
        ("syslog+unix:///run/log", SyslogSink, "syslog /run/log"),
        ("journald:", JournaldSink, "journald /run/systemd/journal/socket"),
        ("journald:/run/j", JournaldSink, "journald /run/j"),
    ],
)
def test_a_url_opens_the_sink_that_it_describes(url: str, kind: type, name: str) -> None:
    sink = Described(url).open()
    assert type(sink) is kind
    assert sink.name == name


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("log", "log"),
        ("a%20b", "a b"),
        ("a#b", "a#b"),
        ("a%3Fb", "a?b"),
        ("100%", "100%"),
        ("%ff", "\udcff"),
        ("é", "é"),
    ],
)
@pytest.mark.parametrize("slashes", ["", "//"])
def test_any_path_can_be_written(tmp_path: Path, written: str, meant: str, slashes: str) -> None:
    described = Described(f"file:{slashes}{tmp_path}/{written}")
    sink = described.open()
    assert isinstance(sink, FileSink)
    sink.close()
    assert (tmp_path / meant).exists()


def test_options_choose_and_shape_what_is_written() -> None:
    described = Described("stdout:?level=Warning&facility=ingress,Egress&format=json&timestamps=yes&fields=no")
    assert described.kind == "json"
    assert described.selection.level is Severity.Warning
    assert described.selection.facilities == {Facility.Ingress, Facility.Egress}
    assert (described.selection.timestamps, described.selection.fields) == (True, False)


def test_options_of_syslog_name_facility_and_application() -> None:
    selection = Described("syslog+unix:?syslog_facility=local7&application=relay-2").selection
    assert (selection.syslog_facility, selection.application) == (23, "relay-2")


@pytest.mark.parametrize(
    ("value", "size"), [("0", 0), ("500", 500), ("4k", 4096), ("100M", 100 << 20), ("2g", 2 << 30)]
)
def test_sizes_have_units(value: str, size: int) -> None:
    described = Described(f"file:/log?rotate_bytes={value}&rotate_s=86400&keep=3")
    assert (described.rotate_bytes, described.rotate_s, described.keep) == (size, 86_400, 3)


def test_defaults_hold_where_the_url_says_nothing() -> None:
    defaults = Selection(
        Severity.Error, frozenset({Facility.Test}), True, True, syslog_facility=16, application="a", host="h"
    )
    assert Described("journald:", defaults, "json").selection == defaults
    assert Described("stdout:", defaults, "json").kind == "json"
    assert Described("stdout:?level=debug&timestamps=no", defaults).selection == Selection(
        Severity.Debug, frozenset({Facility.Test}), False, True, syslog_facility=16, application="a", host="h"
    )


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("", SCHEMES_ALLOWED),
        ("/var/log/mcr.log", SCHEMES_ALLOWED),
        ("http://x", SCHEMES_ALLOWED),
        ("stdout:x", "expected stdout:"),
        ("stdout://x", "expected stdout:"),
        ("file:", "expected file:/path/to/the.log"),
        ("file://host/log", "expected file:/path/to/the.log"),
        ("file:/a%00b", "the path holds a NUL, which no path can"),
        ("file:/\ud800", "the path is no text that a file can be named by"),
        ("journald://host", "expected journald:[/path/to/socket]"),
        ("syslog+unix://dev/log", "expected syslog+unix:[/path/to/socket]"),
        ("syslog+unix:/" + "x" * 107, "the path has 108 bytes: a socket's has at most 107"),
        ("syslog+udp:", "expected syslog+udp://HOST[:PORT], an IPv6 address in brackets"),
        ("syslog+udp:10.0.0.1", "expected syslog+udp://HOST[:PORT], an IPv6 address in brackets"),
        ("syslog+udp://::1", "expected syslog+udp://HOST[:PORT], an IPv6 address in brackets"),
        ("syslog+tcp://[::1", "expected syslog+tcp://HOST[:PORT], an IPv6 address in brackets"),
        ("syslog+tcp://[]", "host '' is no IPv6 address"),
        ("syslog+tcp://[1.2.3.4]", "host '1.2.3.4' is no IPv6 address"),
        ("syslog+udp://", "host '': expected a name or an address; allowed are syslog+udp://HOST[:PORT]"),
        ("syslog+udp://a..b", "host 'a..b': expected a name or an address; allowed are syslog+udp://HOST[:PORT]"),
        ("syslog+udp://ü", "host 'ü': expected a name or an address; allowed are syslog+udp://HOST[:PORT]"),
        ("syslog+udp://h/x", "host 'h/x': expected a name or an address; allowed are syslog+udp://HOST[:PORT]"),
        ("syslog+udp://u@h", "host 'u@h': expected a name or an address; allowed are syslog+udp://HOST[:PORT]"),
        ("syslog+udp://h:", "port '': expected a number from 1 to 65535"),
        ("syslog+udp://h:0", "port '0': expected a number from 1 to 65535"),
        ("syslog+udp://h:65536", "port '65536': expected a number from 1 to 65535"),
        ("syslog+tcp://h:٣", "port '٣': expected a number from 1 to 65535"),
        ("syslog+tcp://[::1]:x", "port 'x': expected a number from 1 to 65535"),
        ("journald:?format=json", "unknown option 'format'; allowed are facility, level"),
        ("stdout:?level", f"level '': allowed are {LEVELS_ALLOWED}"),
        ("stdout:?level=bad", f"level 'bad': allowed are {LEVELS_ALLOWED}"),
        ("stdout:?level=info&level=debug", "option level is given twice"),
        ("stdout:?facility=Test,", "facility '': allowed are supervisor, controlplane, dataplane, ingress, egress, "
            "bufferpool, test"),
        ("stdout:?format=xml", "format 'xml': allowed are text, json"),
        ("stdout:?timestamps=1", "timestamps '1': allowed are yes, no"),
        ("stdout:?", ""),
        ("syslog+unix:?application=a%20b", "application 'a b': expected 1 to 48 printable ASCII characters"),
        ("syslog+unix:?application=", "application '': expected 1 to 48 printable ASCII characters"),
        ("file:/log?rotate_bytes=1.5M", "rotate_bytes '1.5M': expected a number of bytes such as 500000, 100M or 1G"),
        ("file:/log?rotate_s=1d", "rotate_s '1d': expected a number from 0 to 31622400"),
        ("file:/log?keep=1000000000", "keep '1000000000': expected a number from 0 to 1000"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_part_and_what_is_allowed(url: str, problem: str) -> None:
    if not problem:
        assert Described(url).options == {}
        return
    with pytest.raises(SinkError) as refusal:
        Described(url)
    assert str(refusal.value) == f"log sink {url!r}: {problem}"


@given(st.one_of(st.text(), st.builds("".join, st.tuples(
    st.sampled_from([f"{scheme}:" for scheme in SHAPES]),
    st.sampled_from(["", "/", "//", "//[", "//h:", "//[::1]:"]),
    st.text(st.characters(codec=None)),
    st.sampled_from(["", "?level=", "?rotate_bytes=", "?facility=", "&"]),
    st.text(st.characters(codec=None)),
))))  # fmt: skip
@example("syslog+tcp://[")
@example("syslog+udp://\u2100")
@example("file:/\0")
def test_any_text_is_described_or_refused(url: str) -> None:
    try:
        described = Described(url)
    except SinkError as error:
        assert str(error).startswith(f"log sink {url!r}: ")
    else:
        assert described.scheme in SHAPES
        assert not (described.port and not described.host)


@given(st.text(st.characters(codec=None), min_size=1))
def test_every_host_that_is_described_can_be_asked_for(host: str) -> None:
    try:
        described = Described(f"syslog+udp://{host}")
    except SinkError:
        return
    described.host.encode("idna")
    assert 0 < described.port < 65_536


def test_a_name_with_several_addresses_is_reached_where_somebody_listens() -> None:
    with Feed() as feed, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(30)
        sink = Described(f"syslog+udp://localhost:{receiver.getsockname()[1]}").open()
        feed.start(sink)
        feed.give(sink, "hello")
        assert receiver.recv(1000).endswith(b"] hello")


@pytest.mark.parametrize("transport", ["udp", "tcp"])
def test_ipv6_literals_are_reached(transport: str) -> None:
    kind = socket.SOCK_DGRAM if transport == "udp" else socket.SOCK_STREAM
    with Feed() as feed, socket.socket(socket.AF_INET6, kind) as receiver:
        receiver.bind(("::1", 0))
        receiver.settimeout(30)
        if transport == "tcp":
            receiver.listen()
        sink = Described(f"syslog+{transport}://[::1]:{receiver.getsockname()[1]}").open()
        feed.start(sink)
        feed.give(sink, "hello")
        with receiver.accept()[0] if transport == "tcp" else receiver as connection:
            assert connection.recv(1000).endswith(b"] hello")
        sink.close()
