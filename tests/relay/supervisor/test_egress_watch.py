"""What the kernel drops behind the sockets' back is found in its tables."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.addresses import is_ipv6
from relay.supervisor import egress_watch
from relay.supervisor.egress import EgressKey, egress_key
from relay.supervisor.egress_watch import (
    LINES_MAX,
    EgressWatch,
    parse_queue_drops,
    parse_unanswered,
    parse_unanswered_ipv6,
)
from relay.supervisor.interfaces import Interface, snapshot
from tests.system.harness import wait_until
from tools.netns import Line

ARP = """IP address       HW type     Flags       HW address            Mask     Device
10.2.0.99        0x1         0x0         00:00:00:00:00:00     *        right
10.2.0.2         0x1         0x2         c2:a1:5b:99:88:4f     *        right
"""


def key(address: str) -> EgressKey:
    return egress_key(address, 6001, Interface("right", 3, True, True, 1500, ("10.2.0.1",)), None, None, False)


def test_an_entry_without_a_hardware_address_is_unanswered() -> None:
    assert parse_unanswered(ARP) == {("10.2.0.99", "right")}
    assert parse_unanswered("") == set()


@given(st.binary(max_size=200))
def test_any_netlink_answer_is_read_to_its_end_or_refused(answer: bytes) -> None:
    drops, _ = parse_queue_drops(answer)
    assert all(count >= 0 for count in drops.values())
    found, _ = parse_unanswered_ipv6(answer)
    assert all(is_ipv6(address) or "." in address for address, _ in found)


def test_silence_is_told_at_the_second_look_and_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = tmp_path / "arp"
    monkeypatch.setattr(egress_watch, "ARP_TABLE", table)
    watch, keys = EgressWatch(), [key("10.2.0.99"), key("10.2.0.2"), key("239.2.2.1")]
    table.write_text(ARP)
    assert list(watch.look(1, keys)) == []
    (line,) = watch.look(1, keys)
    assert line.startswith("No ARP answer from 10.2.0.99 on right")
    assert list(watch.look(1, keys)) == []
    table.write_text(ARP.replace("0x0 ", "0x2 "))
    assert list(watch.look(1, keys)) == ["10.2.0.99 on right is looked for no more, or answers"]
    assert list(watch.look(1, keys)) == []


def test_many_that_are_silent_are_counted_instead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    addresses = [f"10.2.0.{i}" for i in range(1, 100)]
    table = tmp_path / "arp"
    table.write_text("header\n" + "".join(f"{a} 0x1 0x0 00:00:00:00:00:00 * right\n" for a in addresses))
    monkeypatch.setattr(egress_watch, "ARP_TABLE", table)
    watch, keys = EgressWatch(), [key(address) for address in addresses]
    list(watch.look(1, keys))
    lines = list(watch.look(1, keys))
    assert len(lines) == LINES_MAX + 1
    assert lines[-1].startswith(f"{99 - LINES_MAX} more")


@pytest.fixture
def line() -> Iterator[Line]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    with Line("relay", "sink") as line:
        yield line


def test_what_a_full_queue_drops_is_in_the_kernels_answer(line: Line) -> None:
    host = line.hosts[0]
    queue = ("tbf", "rate", "1mbit", "burst", "2kb", "limit", "3kb")
    assert host.run(["tc", "qdisc", "add", "dev", "right", "root", *queue]).returncode == 0
    with host.inside(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
        index = socket.if_nametoindex("right")
        assert egress_watch.queue_drops().get(index, 0) == 0
        out.bind(("10.1.0.1", 0))
        for _ in range(100):
            out.sendto(bytes(1000), ("10.1.0.2", 6001))
        assert 0 < egress_watch.queue_drops()[index] <= 100


def test_an_ipv6_receiver_that_does_not_answer_is_told_and_when_it_does(line: Line) -> None:
    host, sink = line.hosts
    watch = EgressWatch()
    with host.inside(), socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as out:
        addresses = ("fd00:1::9", "fd00:1::2", "10.1.0.2", "ff3e::1")
        keys = [egress_key(address, 6001, snapshot()["right"], None, None, False) for address in addresses]

        def look() -> list[str]:
            for address in addresses[:2]:
                out.sendto(b"payload", (address, 6001))
            return list(watch.look(1, keys))

        out.sendto(b"payload", ("fd00:1::2", 6001))
        neighbour = ["ip", "neigh", "show", "fd00:1::2"]
        wait_until(lambda: "REACHABLE" in host.run(neighbour, capture_output=True).stdout, "the other one answers")
        assert look() == []
        (line_,) = wait_until(look, "silence is told")
        assert line_.startswith("No neighbour answer from fd00:1::9 on right: what is sent there is lost")
        sink.ip("addr", "add", "fd00:1::9/64", "dev", "left", "nodad")
        assert wait_until(look, "it answers") == ["fd00:1::9 on right is looked for no more, or answers"]
