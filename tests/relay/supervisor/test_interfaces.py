"""What the log says about interfaces that changed."""

import contextlib
import itertools
import os
import select
from pathlib import Path

import msgspec
import pytest

from relay.supervisor.interfaces import Interface, InterfaceMonitor, differences, in_order, parse_flags, snapshot
from tests.system.harness import wait_until
from tools.netns import Line

ETH0 = Interface("eth0", 2, is_up=True, has_carrier=True, mtu_bytes=1500, addresses=("10.0.0.1",))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"is_up": False, "has_carrier": False}, "Interface eth0 is down"),
        ({"has_carrier": False}, "Interface eth0 has no carrier"),
        ({"addresses": ("10.0.0.7", "10.0.0.8")}, "Interface eth0 has 10.0.0.7, 10.0.0.8"),
        ({"addresses": ()}, "Interface eth0 has no IPv4 address"),
        ({"mtu_bytes": 1000}, "Interface eth0 has an MTU of 1000 bytes"),
        ({"index": 3}, "Interface eth0 appeared, up"),
    ],
)
def test_each_change_is_one_line(change: dict[str, object], line: str) -> None:
    after = msgspec.structs.replace(ETH0, **change)
    assert list(differences({"eth0": ETH0}, {"eth0": after}, set())) == [line]


def test_what_stays_the_same_is_no_line() -> None:
    assert list(differences({"eth0": ETH0}, {"eth0": ETH0}, set())) == []
    assert list(differences({"eth0": ETH0}, {}, set())) == ["Interface eth0 is gone"]


def test_a_carrier_is_told_again_only_where_its_loss_was() -> None:
    """The kernel announces up before it announces the carrier."""
    told: set[str] = set()
    down = msgspec.structs.replace(ETH0, is_up=False, has_carrier=False)
    without = msgspec.structs.replace(ETH0, has_carrier=False)
    steps = [down, without, ETH0, without, ETH0, without, down, without, ETH0]
    lines = [list(differences({"eth0": a}, {"eth0": b}, told)) for a, b in itertools.pairwise(steps)]
    words = ("is up", "is down", "has no carrier", "has a carrier again")
    up, off, lost, back = (f"Interface eth0 {what}" for what in words)
    assert lines == [[up], [], [lost], [back], [lost], [off], [up], []]


# --- IPv6 addresses ---------------------------------------------------------------------------------

IF_INET6 = """\
fe800000000000000000000000000001 02 40 20 80     eth0
fd000001000000000000000000000001 02 40 00 a0     eth0
00000000000000000000000000000001 01 80 10 80       lo
"""


def test_flags_are_read() -> None:
    assert parse_flags(IF_INET6) == {("eth0", "fe80::1"): 0x80, ("eth0", "fd00:1::1"): 0xA0, ("lo", "::1"): 0x80}


@pytest.mark.parametrize(
    ("flags", "ordered"),
    [
        ({"fd00::2": 0x80, "fd00::1": 0x80, "fe80::1": 0x80}, ("fd00::1", "fd00::2", "fe80::1")),
        ({"fd00::1": 0xA0, "fe80::1": 0x80}, ("fd00::1", "fe80::1")),
        ({"fd00::2": 0x80, "fd00::1": 0xA0}, ("fd00::2", "fd00::1")),
        ({"fd00::2": 0x00, "fd00::1": 0x01}, ("fd00::2", "fd00::1")),
        ({"fd00::1": 0xC0, "fe80::1": 0x80}, ("fe80::1",)),
        ({"fd00::1": 0x44}, ("fd00::1",)),
        ({"fd00::1": 0x08}, ()),
    ],
)
def test_the_best_address_that_can_be_sent_from_is_first(flags: dict[str, int], ordered: tuple[str, ...]) -> None:
    """0x80 is permanent, 0x40 tentative, 0x20 deprecated, 0x08 a duplicate, 0x04 optimistic, 0x01 temporary."""
    assert in_order(flags) == ordered


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"addresses6": ("fd00::1", "fe80::1")}, "Interface eth0 has fd00::1, fe80::1"),
        ({"addresses6": ()}, "Interface eth0 has no IPv6 address"),
    ],
)
def test_a_change_of_ipv6_addresses_is_one_line(change: dict[str, object], line: str) -> None:
    before = msgspec.structs.replace(ETH0, addresses6=("fe80::1",))
    assert list(differences({"eth0": before}, {"eth0": msgspec.structs.replace(before, **change)}, set())) == [line]


def test_each_family_needs_an_address_of_its_own() -> None:
    narrow = msgspec.structs.replace(ETH0, mtu_bytes=1279)
    assert narrow.fault(ipv6=True) == "interface eth0 has an MTU of 1279 bytes, and IPv6 needs 1280"
    assert narrow.fault() is None
    only6 = msgspec.structs.replace(ETH0, addresses=(), addresses6=("fe80::1",))
    assert (ETH0.fault(), ETH0.fault(ipv6=True)) == (None, "interface eth0 has no IPv6 address")
    assert (only6.fault(), only6.fault(ipv6=True)) == ("interface eth0 has no IPv4 address", None)


def test_a_snapshot_has_ipv6_addresses_once_they_are_usable_and_changes_are_announced() -> None:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    with Line("one", "two") as line, line.hosts[0].inside():
        link_local = wait_until(lambda: snapshot()["right"].addresses6[1:], "the carrier brings a link-local address")[
            0
        ]
        assert link_local.startswith("fe80::")
        with contextlib.closing(InterfaceMonitor()) as monitor:
            assert snapshot()["right"].addresses6 == ("fd00:1::1", link_local)
            line.hosts[0].ip("addr", "add", "fd00:1::9/64", "dev", "right", "nodad")
            assert select.select([monitor], [], [], 10)[0]
        line.hosts[0].ip("addr", "add", "fd00:1::a/64", "dev", "right", "nodad", "preferred_lft", "0")
        for name, value in (("accept_dad", "1"), ("dad_transmits", "100")):
            Path(f"/proc/sys/net/ipv6/conf/right/{name}").write_text(value)
        line.hosts[0].ip("addr", "add", "fd00:1::b/64", "dev", "right")  # is looked for for 100 s: may be another's
        assert snapshot()["right"].addresses6 == ("fd00:1::1", "fd00:1::9", "fd00:1::a", link_local)
        Path("/proc/sys/net/ipv6/conf/right/disable_ipv6").write_text("1")
        assert snapshot()["right"].addresses6 == ()
