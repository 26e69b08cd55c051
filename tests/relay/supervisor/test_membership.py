"""Joining and holding what inputs need, of both families, in a namespace of its own."""

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from relay.supervisor.interfaces import snapshot
from relay.supervisor.membership import Listen, Memberships
from relay.supervisor.orphans import KeptMembership, kept_memberships
from tests.system.harness import wait_until
from tools.netns import Line

SOURCES_OF_A_GROUP_MAX = 64  # mld_max_msf, as it is by default


@pytest.fixture
def left() -> Iterator[int]:
    """The index of an interface; the test runs in its namespace."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    with Line("peer", "relay") as line, line.hosts[1].inside():
        yield socket.if_nametoindex("left")


@pytest.fixture
def memberships() -> Iterator[Memberships]:
    memberships = Memberships()
    yield memberships
    memberships.close()


def joined() -> set[str]:
    """The IPv6 groups of `left` that programs have joined."""
    rows = [line.split() for line in Path("/proc/thread-self/net/igmp6").read_text().splitlines()]
    addresses = [socket.inet_ntop(socket.AF_INET6, bytes.fromhex(row[2])) for row in rows if row[1] == "left"]
    return {address for address in addresses if not address.startswith(("ff02::1", "ff01::1", "ff02::2", "ff05::2"))}


def sources(group: str) -> set[str]:
    """The sources that are asked for of the IPv6 group that was joined last: the kernel shows those of no other if
    that has none.
    """
    rows = [line.split() for line in Path("/proc/thread-self/net/mcfilter6").read_text().splitlines()[1:]]
    packed = socket.inet_pton(socket.AF_INET6, group).hex()
    return {
        socket.inet_ntop(socket.AF_INET6, bytes.fromhex(row[3])) for row in rows if row[2] == packed and row[4] != "0"
    }


def test_groups_of_both_families_are_joined_with_sources_and_left(left: int, memberships: Memberships) -> None:
    wanted = (
        Listen("239.1.1.1", 0, left, None),
        Listen("232.1.1.1", 0, left, "10.1.0.1"),
        Listen("ff3e::7", 0, left, None),
        Listen("ff02::4321", 0, left, None),
        Listen("ff3e::8", 0, left, "fd00:1::1"),
    )
    assert memberships.sockets_wanted(wanted) == 2
    assert memberships.update(wanted) == []
    assert len(set(memberships.joined.values())) == 2
    assert joined() == {"ff3e::7", "ff3e::8", "ff02::4321"}
    assert (sources("ff3e::8"), sources("ff3e::7")) == ({"fd00:1::1"}, set())
    memberships.update({Listen("ff3e::8", 0, left, "fd00:1::1")})
    assert joined() == {"ff3e::8"}
    memberships.update(())
    assert joined() == set()


def test_what_a_full_socket_refuses_the_next_takes(left: int, memberships: Memberships) -> None:
    many = {Listen("ff3e::8", 0, left, f"fd00:1::{number:x}") for number in range(1, SOURCES_OF_A_GROUP_MAX + 10)}
    assert memberships.update(many) == []
    assert len(set(memberships.joined.values())) == 2
    assert len(sources("ff3e::8")) == len(many)
    assert memberships.update({*many, Listen("ff3e::8", 0, left, None)}) == []
    assert len(set(memberships.joined.values())) == 3


def test_groups_beyond_the_memory_for_options_go_to_the_next_socket(left: int, memberships: Memberships) -> None:
    optmem_max = Path("/proc/sys/net/core/optmem_max")
    if not optmem_max.exists():
        pytest.skip("optmem_max is the whole host's here")
    optmem_max.write_text("2048")
    many = {Listen(f"ff3e::{number:x}", 0, left, None) for number in range(1, 101)}
    assert memberships.update(many) == []
    assert len(set(memberships.joined.values())) > 1
    assert len(joined()) == 100


def test_what_a_small_mtu_took_away_is_joined_again(left: int, memberships: Memberships) -> None:
    wanted = [Listen("ff3e::7", 0, left, None), Listen("ff3e::8", 0, left, "fd00:1::1")]
    wanted.append(Listen("239.1.1.1", 0, left, None))
    memberships.update(wanted)
    assert memberships.lapsed() == []
    for mtu in ("1000", "1500"):
        subprocess.run(["ip", "link", "set", "left", "mtu", mtu], check=True)
    assert joined() == set()
    assert set(memberships.lapsed()) == set(wanted[:2])
    assert memberships.update(wanted) == []
    assert joined() == {"ff3e::7", "ff3e::8"}
    assert memberships.lapsed() == []


def test_a_refusal_is_a_warning_and_the_rest_is_joined(left: int, memberships: Memberships) -> None:
    wanted = (Listen("ff3e::7", 0, 9999, None), Listen("ff3e::8", 0, left, None), Listen("fd00:9::9", 5001, 0, None))
    warnings = memberships.update(wanted)
    assert warnings[0] == "joining ff3e::7 on interface 9999: No such device"
    told = "fd00:9::9 is no address of this host: only what is routed through it comes to the relay"
    assert warnings[1].startswith(told)
    assert joined() == {"ff3e::8"}


def test_unicast_inputs_are_held_on_their_link_if_they_exist_once_a_link(left: int, memberships: Memberships) -> None:
    link_local = wait_until(lambda: snapshot()["left"].addresses6[1:], "the carrier brings a link-local address")[0]
    places = ((link_local, left), ("fd00:1::2", 0), ("10.1.0.2", 0))
    assert memberships.update([Listen(address, 5001, index, None) for address, index in places]) == []
    held = [sock.getsockname() for sock in memberships.held.values()]
    assert held == [(link_local, 5001, 0, left), ("fd00:1::2", 5001, 0, 0), ("10.1.0.2", 5001)]
    memberships.update(())
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as other:
        other.bind((link_local, 5001, 0, left))


def test_a_successor_goes_on_with_what_is_joined(left: int, memberships: Memberships) -> None:
    memberships.update({Listen("ff3e::8", 0, left, "fd00:1::1"), Listen("fd00:1::2", 5001, 0, None)})
    raw = msgspec.json.encode(kept_memberships(memberships.joined))
    kept = msgspec.json.decode(raw, type=tuple[KeptMembership, ...])
    successor = Memberships()
    successor.adopt({kept[0].listen: next(iter(memberships.joined.values())).dup()}, {})
    memberships.close()
    assert sources("ff3e::8") == {"fd00:1::1"}
    successor.update(())
    assert joined() == set()
