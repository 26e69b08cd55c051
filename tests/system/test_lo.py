"""The README's way: one relay on lo, sender and receiver beside it, in a namespace of its own."""

from pathlib import Path

import pytest

from tests.system.conftest import StartRelay
from tests.system.harness import assert_perfect, receiving, send
from tools.netns import Host

DATAGRAMS = 100_000


@pytest.mark.parametrize("workers", [1, 2])
def test_fifty_thousand_a_second_on_lo_arrive_whole_and_in_order(
    start_relay: StartRelay, tmp_path: Path, workers: int
) -> None:
    with Host("lo") as host:
        relay = start_relay(host, ("lo",), workers)
        relay.add("tour", "239.1.1.1:5001", "239.2.2.2:6001:lo")
        with receiving(host, tmp_path) as summary:
            send(host, "--rate", "50000", "--count", str(DATAGRAMS), "--flows", "4")
            assert_perfect(summary(DATAGRAMS), DATAGRAMS)
        assert relay.assert_accounted()["packets_relayed"] == DATAGRAMS
        relay.stop()
