"""What a worker is handed, and in which order."""

import os
from collections.abc import Iterator

import msgspec
import pytest

from logging_shm import LevelPolicy
from relay.descriptors import Channel, channel_pair
from relay.messages import AddRing, FromWorker, SetSockets, SetTable, ToWorker
from relay.rules import Output, Rule
from relay.supervisor.fleet import Fleet
from relay.supervisor.ingress import Fanout
from relay.supervisor.interfaces import snapshot
from tools.netns import Host

RULE = Rule(rule_id="r1", input_group="239.1.1.1", input_port=5001, outputs=(Output("239.2.2.2", 6001, "lo"),))


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    """One core, one rule on lo, in a namespace of its own; no process behind it."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces and packet sockets need root")
    with Host("fleet") as host, host.inside():
        owner = (os.geteuid(), os.getegid())
        fleet = Fleet([0], f"fleet{os.getpid()}", owner, ["lo"], 1 << 20, Fanout.hash, LevelPolicy())
        try:
            fleet.begin([RULE], snapshot(), strict=True)
            fleet.finish()
            yield fleet
        finally:
            fleet.close()


def received(far: Channel[ToWorker]) -> list[type]:
    """The types of the messages that wait."""
    kinds: list[type] = []
    while True:
        try:
            message, descriptors = far.receive()
        except BlockingIOError:
            return kinds
        for descriptor in descriptors:
            os.close(descriptor)
        kinds.append(type(message))


def test_a_new_worker_has_its_table_before_the_rings_that_filled_meanwhile(fleet: Fleet) -> None:
    """With the ring first, frames that wait in it would find no rule and be dropped."""
    (worker,) = fleet.workers
    worker.channel, end = channel_pair(FromWorker)
    end.setblocking(False)
    fleet.worker_started(worker)
    assert received(Channel(end, ToWorker)) == [SetSockets, SetTable, AddRing]
    worker.channel.close()
    end.close()
    worker.channel = None


def test_a_refused_output_waits_says_why_once_and_comes_back(fleet: Fleet) -> None:
    """The address went between the look at the interfaces and the bind."""
    (true,) = (interface for interface in snapshot().values() if interface.name == "lo")
    gone = {"lo": msgspec.structs.replace(true, addresses=("192.0.2.1",))}
    why = "output 239.2.2.2:6001 on lo: Cannot assign requested address"
    numbers_left = fleet._socket_numbers.left()
    assert fleet.begin([RULE], gone, strict=False) == [why]
    fleet.finish()
    assert fleet.plan.rules[0].state == f"waiting: {why}"
    assert fleet.is_incomplete
    assert fleet.begin([RULE], gone, strict=False) == []
    fleet.finish()
    assert fleet.begin([RULE], {"lo": true}, strict=False) == []
    fleet.finish()
    assert fleet.plan.rules[0].state == "active"
    assert not fleet.is_incomplete
    assert fleet._socket_numbers.left() == numbers_left
