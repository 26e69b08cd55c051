"""What the log says about interfaces that changed."""

import itertools

import msgspec
import pytest

from relay.supervisor.interfaces import Interface, differences

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
