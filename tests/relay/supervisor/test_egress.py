"""Egress sockets of IPv6 outputs: what arrives is what the output's options say."""

import errno
import os
import socket
import struct
from collections.abc import Iterator

import pytest

from relay.dataplane.send import SOL_UDP, UDP_SEGMENT
from relay.supervisor.egress import EgressKey, egress_key, open_egress
from relay.supervisor.interfaces import snapshot
from tests.system.harness import wait_until
from tools.netns import Host, Line

PORT = 6001
HOP_LIMIT, TRAFFIC_CLASS = socket.IPV6_HOPLIMIT, socket.IPV6_TCLASS
PAYLOAD_BYTES_MAX = 1500 - 48


@pytest.fixture
def line() -> Iterator[Line]:
    """relay ─ sink, the test in the relay's namespace."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    with Line("relay", "sink") as line, line.hosts[0].inside():
        yield line


def key_to(group: str, ttl: int | None = None, dscp: int | None = None, preserve: bool = False) -> EgressKey:
    return egress_key(group, PORT, snapshot()["right"], ttl, dscp, preserve)


def listener(sink: Host, group: str) -> socket.socket:
    """A socket that gets what is sent to an address, with hop limit and traffic class."""
    with sink.inside():
        left = socket.if_nametoindex("left")
        sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        sock.settimeout(10)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVHOPLIMIT, 1)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS, 1)
        sock.bind((group, PORT, 0, left))
        if group.startswith("ff"):
            request = socket.inet_pton(socket.AF_INET6, group) + struct.pack("@I", left)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, request)
    return sock


def received(sock: socket.socket) -> tuple[int, str, int, int]:
    """Payload bytes, source, hop limit and traffic class of a datagram."""
    payload, control, _, sender = sock.recvmsg(65_536, 200)
    options = {kind: struct.unpack("@i", data)[0] for _, kind, data in control}
    return len(payload), sender[0].partition("%")[0], options[HOP_LIMIT], options[TRAFFIC_CLASS]


@pytest.mark.parametrize(
    ("group", "ttl", "dscp", "hop_limit"),
    [
        ("ff3e::1", None, None, 1),
        ("ff3e::1", 9, 34, 9),
        ("ff02::4321", None, None, 1),
        ("fd00:1::2", None, 46, 64),
        ("fd00:1::2", 9, None, 9),
    ],
)
def test_an_output_has_its_hop_limit_class_and_the_interfaces_source(
    line: Line, group: str, ttl: int | None, dscp: int | None, hop_limit: int
) -> None:
    key = key_to(group, ttl, dscp)
    assert key.is_ipv6
    with listener(line.hosts[1], group) as sink, open_egress(key) as egress:
        if key.is_connected:
            egress.send(bytes(100))
        else:
            egress.sendto(bytes(100), (group, PORT))
        assert received(sink) == (100, "fd00:1::1", hop_limit, (dscp or 0) << 2)


def test_a_link_local_address_is_the_source_where_there_is_no_other(line: Line) -> None:
    line.hosts[0].ip("addr", "del", "fd00:1::1/64", "dev", "right")
    wait_until(lambda: snapshot()["right"].addresses6, "the carrier brings a link-local address")
    with listener(line.hosts[1], "ff3e::1") as sink, open_egress(key_to("ff3e::1")) as egress:
        egress.send(bytes(100))
        assert received(sink)[1] == snapshot()["right"].addresses6[0]
    assert egress.fileno() == -1


def test_a_preserved_source_is_sent_from(line: Line) -> None:
    key = key_to("ff3e::1", preserve=True)
    info = socket.inet_pton(socket.AF_INET6, "2001:db8::5") + struct.pack("@I", key.ifindex)
    with listener(line.hosts[1], "ff3e::1") as sink, open_egress(key) as egress:
        control = [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, info)]
        egress.sendmsg([bytes(100)], control, 0, ("ff3e::1", PORT))
        assert received(sink)[1] == "2001:db8::5"


def test_segments_fill_a_frame_and_larger_datagrams_are_fragmented(line: Line) -> None:
    key = key_to("ff3e::1")
    assert key.gso_segment_bytes_max == PAYLOAD_BYTES_MAX
    with listener(line.hosts[1], "ff3e::1") as sink, open_egress(key) as egress:
        segment = [(SOL_UDP, UDP_SEGMENT, struct.pack("@H", key.gso_segment_bytes_max))]
        egress.sendmsg([bytes(2 * key.gso_segment_bytes_max)], segment)
        egress.send(bytes(4000))
        assert [received(sink)[0] for _ in range(3)] == [PAYLOAD_BYTES_MAX, PAYLOAD_BYTES_MAX, 4000]
        more = key.gso_segment_bytes_max + 1
        segment = [(SOL_UDP, UDP_SEGMENT, struct.pack("@H", more))]
        with pytest.raises(OSError, match=r"Invalid argument|Message too long"):
            egress.sendmsg([bytes(2 * more)], segment)


def test_what_a_full_queue_drops_is_told(line: Line) -> None:
    queue = ("rate", "8kbit", "burst", "1600", "limit", "1600")
    line.hosts[0].run(["tc", "qdisc", "add", "dev", "right", "root", "tbf", *queue])
    with open_egress(key_to("ff3e::1")) as egress:
        for _ in range(100):
            try:
                egress.send(bytes(1000))
            except OSError as error:
                assert error.errno == errno.ENOBUFS
                return
    pytest.fail("a queue of 1 600 bytes took 100 000")
