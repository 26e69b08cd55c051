"""What a worker is handed, and in which order."""

import os
import resource
import socket
from collections.abc import Iterator

import msgspec
import psutil
import pytest

from relay.dataplane.table import map_table
from relay.descriptors import Channel, channel_pair
from relay.messages import AddRing, FromWorker, SetGuardCells, SetSockets, SetTable, ToWorker
from relay.rules import Output, Rule
from relay.supervisor.fleet import Fleet
from relay.supervisor.ingress import FRAME_BYTES, count_filled, take_ring_drops
from relay.supervisor.interfaces import snapshot
from relay.supervisor.worker import WAITING_MAX, Worker
from tests.relay.supervisor.bare_fleet import RING_BYTES, bare_fleet

RULE = Rule(rule_id="r1", input_group="239.1.1.1", input_port=5001, outputs=(Output("239.2.2.2", 6001, "lo"),))


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    """One core, one rule on lo, in a namespace of its own; no process behind it."""
    with bare_fleet("fleet", [0], RULE) as fleet:
        yield fleet


@pytest.fixture
def pair() -> Iterator[Fleet]:
    """Two cores that share one interface, lo, in a namespace of their own; no process behind them."""
    with bare_fleet("pair", [0, 1], RULE) as fleet:
        yield fleet


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
    assert received(Channel(end, ToWorker)) == [SetSockets, SetGuardCells, SetTable, AddRing]
    worker.channel.close()
    end.close()
    worker.channel = None


WAITING = 300  # messages, after those that the socket's buffer holds


def rules_of(change: int) -> list[Rule]:
    """The rules after so many changes: each replaces an output, so takes a socket and gives one back."""
    return [msgspec.structs.replace(RULE, outputs=(Output("239.2.2.2", 6001 + change, "lo"),))]


@pytest.fixture
def deaf(fleet: Fleet) -> Iterator[tuple[Worker, Channel[ToWorker]]]:
    """The fleet's worker, which runs but reads nothing until the test does; and its end."""
    (worker,) = fleet.workers
    worker.channel, end = channel_pair(FromWorker)
    end.setblocking(False)
    fleet.worker_started(worker)
    yield worker, Channel(end, ToWorker)
    if worker.channel is not None:
        fleet.worker_gone(worker)
    end.close()


def descriptors() -> int:
    return psutil.Process().num_fds()


def test_what_a_worker_does_not_read_waits_for_it_in_order(
    fleet: Fleet, deaf: tuple[Worker, Channel[ToWorker]]
) -> None:
    worker, far = deaf
    change = 0
    while len(worker.waiting) < WAITING:
        change += 1
        fleet.begin(rules_of(change), snapshot(), strict=True)
        if change % 2:
            fleet.finish()  # which closes what was retired, though the worker has not read of it
    sockets: dict[int, str] = {}
    generations = []
    while True:
        try:
            message, owned = far.receive()
        except BlockingIOError:
            if not worker.waiting:
                break
            worker.flush()
            continue
        match message:
            case SetSockets():
                for number, descriptor in zip(message.numbers, owned, strict=True):
                    with socket.socket(fileno=descriptor) as handed:
                        sockets[number] = "{}:{}".format(*handed.getpeername())
            case SetTable():
                table = map_table(owned[0])
                os.close(owned[0])
                generations.append(table.generation)
            case AddRing():
                os.close(owned[0])
    assert generations == list(range(1, fleet.generation + 1))
    assert f"239.2.2.2:{6001 + change}" in sockets.values()


def test_a_worker_that_never_reads_is_given_up_and_costs_no_descriptor(
    fleet: Fleet, deaf: tuple[Worker, Channel[ToWorker]]
) -> None:
    worker, _ = deaf
    before = descriptors()
    for change in range(1, 2 * WAITING_MAX):
        fleet.begin(rules_of(change), snapshot(), strict=True)
        fleet.finish()
    assert worker.is_out_of_step
    assert not worker.waiting
    assert descriptors() == before
    fleet.worker_gone(worker)
    assert not worker.is_out_of_step


def test_a_message_that_can_not_be_kept_gives_its_worker_up(
    fleet: Fleet, deaf: tuple[Worker, Channel[ToWorker]]
) -> None:
    worker, _ = deaf
    change = 0
    while not worker.waiting:
        change += 1
        fleet.begin(rules_of(change), snapshot(), strict=True)
        fleet.finish()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        worker.send(SetSockets((0,)), [1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert worker.is_out_of_step
    assert not worker.waiting


def send_flows(flows: int, datagrams_each: int) -> None:
    """Send to the rule's input from many ports, so that every member of the fanout group gets some."""
    for _ in range(flows):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
            for _ in range(datagrams_each):
                sender.sendto(b"x", (RULE.input_group, RULE.input_port))


def test_a_worker_that_is_given_up_has_every_frame_counted_that_it_lost(pair: Fleet) -> None:
    """What waits in its ring, and what the kernel found no room for since the last count."""
    fleet = pair
    kept, given_up = fleet.workers
    send_flows(flows=32, datagrams_each=64)
    lost = fleet.rings.exclude(given_up)
    assert lost is not None
    (ring,) = kept.rings.values()
    others = count_filled(ring, RING_BYTES) + take_ring_drops(ring)
    assert lost > RING_BYTES // FRAME_BYTES  # more than the ring holds
    assert lost + others == 32 * 64
    assert given_up.stats.header["ring_full"] == lost
    send_flows(flows=32, datagrams_each=1)
    assert count_filled(ring, RING_BYTES) + take_ring_drops(ring) >= 32  # the group has one member now


def test_the_only_worker_keeps_its_traffic(fleet: Fleet) -> None:
    (worker,) = fleet.workers
    assert fleet.rings.exclude(worker) is None
    assert worker.rings


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
