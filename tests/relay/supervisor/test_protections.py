"""Rings of protected inputs, and records that go from worker to worker. The kernel's sockets, and no process."""

import mmap
import os
import socket
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from logging_shm import Facility, LevelPolicy, SupervisorLogging
from relay.addresses import halves
from relay.dataplane import layout
from relay.dataplane.counters import StatsSegment
from relay.dataplane.table import view_table
from relay.errors import RelayError, RuleError
from relay.rules import Output, Rule, Secondary
from relay.supervisor.fleet import Fleet
from relay.supervisor.ingress import FRAME_BYTES, Fanout
from relay.supervisor.interfaces import snapshot
from relay.supervisor.protection_watch import ProtectionWatch, health_of
from relay.supervisor.protections import Protections, identity
from relay.supervisor.worker import Worker
from tests.relay.supervisor.bare_fleet import RING_BYTES, bare_fleet, install, read_all
from tools.netns import Line

MS = 1_000_000
OUTPUT = (Output("239.2.2.2", 6001, "lo"),)
PLAIN = Rule(rule_id="tv", input_group="239.1.1.1", input_port=5001, outputs=OUTPUT)
OTHER = Rule(rule_id="other", input_group="239.1.1.1", input_port=5001, outputs=(Output("239.2.2.3", 6001, "lo"),))
ELSEWHERE = Rule(rule_id="far", input_group="239.1.1.9", input_port=5001, outputs=OUTPUT)
SECONDARY = Secondary(input_group="239.1.1.2")
TV = msgspec.structs.replace(PLAIN, secondary=SECONDARY, protection="seamless")
STANDBY = msgspec.structs.replace(TV, protection="failover", stall_ms=200)


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    """Two cores on lo in a namespace of their own."""
    with bare_fleet("protected", [0, 1]) as fleet:
        yield fleet


def send(*groups: str, flows: int = 16) -> None:
    """A datagram to each group from each of many ports, so that every member of a fanout group gets some."""
    for _ in range(flows):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
            for group in groups:
                sender.sendto(b"x", (group, 5001))


def frames_in(ring: socket.socket) -> list[str]:
    """Where the frames go that nobody has read."""
    with mmap.mmap(ring.fileno(), RING_BYTES, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
        content = bytes(mapped)
    found = []
    for at in range(0, RING_BYTES, FRAME_BYTES):
        header = np.frombuffer(content, layout.TPACKET2_HDR, 1, at)[0]
        if header["tp_status"] & layout.TP_STATUS_USER:
            ip = at + int(header["tp_mac"]) + 14
            found.append(socket.inet_ntoa(content[ip + 16 : ip + 20]))
    return found


def seen(fleet: Fleet) -> dict[int, dict[int, set[str]]]:
    """The groups in each worker's rings, by core and ring number."""
    return {w.core: {number: set(frames_in(ring)) for number, ring in w.rings.items()} for w in fleet.workers}


def keys_of(fleet: Fleet, group: str) -> dict[int, tuple[int, bool]]:
    """By ring: how many rules a group goes to, and whether one of them is protected."""
    table = view_table(fleet._table)
    entries = table["entries"]
    return {
        int(key["ring"]): (int(entries[key["entry"]]["routes"]), bool(entries[key["entry"]]["protection"]))
        for key in table["keys"]
        if key["entry"] >= 0 and (key["dst_first"], key["dst_second"]) == halves(group)
    }


def test_protected_inputs_are_read_by_one_worker_and_others_by_all(fleet: Fleet) -> None:
    install(fleet, TV, ELSEWHERE)
    send("239.1.1.1", "239.1.1.2", "239.1.1.9")
    shared, own = 0, 1
    assert seen(fleet) == {
        0: {shared: {"239.1.1.9"}, own: {"239.1.1.1", "239.1.1.2"}},
        1: {shared: {"239.1.1.9"}},
    }
    assert len(frames_in(fleet.workers[0].rings[own])) == 32
    assert keys_of(fleet, "239.1.1.1") == keys_of(fleet, "239.1.1.2") == {own: (1, True)}
    assert keys_of(fleet, "239.1.1.9") == {shared: (1, False)}


def test_an_input_that_becomes_protected_is_read_from_both_rings_until_one_has_it_all(fleet: Fleet) -> None:
    install(fleet, PLAIN, OTHER)
    send("239.1.1.1")
    fleet.begin((TV, OTHER), snapshot(), strict=True)
    assert keys_of(fleet, "239.1.1.1") == {0: (2, False), 1: (2, True)}
    assert keys_of(fleet, "239.1.1.2") == {1: (1, True)}  # nobody had it before
    fleet.finish()
    assert keys_of(fleet, "239.1.1.1") == {1: (2, True)}
    before = {w.core: len(frames_in(w.rings[0])) for w in fleet.workers}
    assert sum(before.values()) == 16
    send("239.1.1.1")
    assert {w.core: len(frames_in(w.rings[0])) for w in fleet.workers} == before
    assert len(frames_in(fleet.workers[0].rings[1])) == 16

    fleet.begin((OTHER,), snapshot(), strict=True)
    assert keys_of(fleet, "239.1.1.1") == {0: (1, False), 1: (1, False)}
    assert keys_of(fleet, "239.1.1.2") == {}
    fleet.finish()
    assert keys_of(fleet, "239.1.1.1") == {0: (1, False)}
    assert [list(worker.rings) for worker in fleet.workers] == [[0], [0]]


def test_without_a_ring_of_its_own_a_protected_rule_has_its_primary_and_others_have_all(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(fleet, PLAIN, OTHER)
    with monkeypatch.context() as refusing:
        refusing.setattr("relay.supervisor.rings.open_ring", refuse)
        assert fleet.begin((TV, OTHER), snapshot(), strict=True) == ["packet ring on lo: Cannot allocate memory"]
        fleet.finish()
    assert fleet.is_incomplete
    assert keys_of(fleet, "239.1.1.1") == {0: (2, False)}
    send("239.1.1.1")
    assert sum(len(frames_in(worker.rings[0])) for worker in fleet.workers) == 16
    install(fleet, TV, OTHER)  # as it is tried again
    assert not fleet.is_incomplete
    assert keys_of(fleet, "239.1.1.1") == {1: (2, True)}


def refuse(interface: str, *_: object) -> None:
    raise RelayError(f"packet ring on {interface}: Cannot allocate memory")


def test_another_worker_reads_on_where_one_is_given_up_and_knows_what_was_let_through(fleet: Fleet) -> None:
    install(fleet, TV)
    send("239.1.1.1")
    first, second = fleet.workers
    number = fleet.protections.number_of(TV)
    first.stats.protections[number]["passed"][5] = 0b111
    first.stats.journal["entries"][0] = number << layout.JOURNAL_SEQUENCE_BITS | 5 * 64 + 1
    first.stats.journal["count"] = 1
    assert fleet.rings.exclude(first) == 16
    assert second.stats.protections[number]["passed"][5] == 0b101  # without what was not sent yet
    send("239.1.1.1", "239.1.1.2")
    assert len(frames_in(second.rings[1])) == 32
    assert fleet.rings.reader() is second
    fleet.rings.readmit(first)
    assert list(first.rings) == [0]  # what is one's stays one's
    install(fleet, TV, ELSEWHERE)
    send("239.1.1.1")
    assert len(frames_in(second.rings[1])) == 48
    assert fleet.rings.created_anew() == set()
    assert {ring.reader for ring in fleet.inventory(1).rings} == {None, 1}


def test_records_of_a_former_supervisor_are_found_by_their_rules() -> None:
    """Its numbers were others. Counts begin anew, what was let through does not."""
    owner = (os.geteuid(), os.getegid())
    with (
        StatsSegment.create(0, f"protf{os.getpid()}", *owner) as former,
        StatsSegment.create(0, f"proth{os.getpid()}", *owner) as heir,
    ):
        numbers = Protections()
        numbers.follow([TV, STANDBY], [former])
        for rule, bits in ((TV, 7), (STANDBY, 9)):
            record = former.protections[numbers.number_of(rule)]
            record["passed"][0], record["withheld"], record["highest"] = bits, 100, 70_000
            record["legs"]["packets"] = 50
        later = Protections()
        later.follow([STANDBY], [heir])
        later.follow([STANDBY, TV], [heir])
        later.inherit(heir, former, with_counts=False)
        for rule, bits in ((TV, 7), (STANDBY, 9)):
            record = heir.protections[later.number_of(rule)]
            assert (record["passed"][0], record["highest"], record["identity"]) == (bits, 70_000, identity(rule))
            assert record["withheld"] == record["legs"]["packets"].sum() == 0
        former.header["protection_bytes"] += 8  # of another version
        heir.protections["passed"] = 0
        later.inherit(heir, former, with_counts=False)
        assert not heir.protections["passed"].any()


def test_a_rule_with_other_legs_begins_anew() -> None:
    moved = msgspec.structs.replace(TV, secondary=Secondary(input_group="239.1.1.3"))
    more_outputs = msgspec.structs.replace(TV, outputs=(*OUTPUT, Output("239.2.2.9", 6001, "lo")))
    assert identity(moved) != identity(TV) == identity(more_outputs)


def test_more_protected_rules_than_there_are_records_are_refused(fleet: Fleet) -> None:
    def rules(count: int, first_port: int = 1) -> list[Rule]:
        return [
            msgspec.structs.replace(TV, rule_id=f"r{first_port + i}", input_port=first_port + i) for i in range(count)
        ]

    with pytest.raises(RuleError, match="513 rules with a secondary input are over the limit of 512"):
        fleet.begin(rules(layout.PROTECTIONS_MAX + 1), snapshot(), strict=True)
    install(fleet, *rules(layout.PROTECTIONS_MAX))
    with pytest.raises(RuleError, match="too many protected rules change at once"):
        fleet.begin(rules(1, first_port=1000), snapshot(), strict=True)
    install(fleet, *rules(layout.PROTECTIONS_MAX - 1))
    install(fleet, *rules(layout.PROTECTIONS_MAX - 2), TV)


def test_fragments_of_other_inputs_are_put_together_as_before() -> None:
    """In a ring of a group of its own, which reassembles too, the one would take the other's."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces and packet sockets need root")
    with Line("gen", "relay", "sink") as line:
        gen, relay, _ = line.hosts
        output = (Output("239.2.2.2", 6001, "right"),)
        rules = [msgspec.structs.replace(rule, outputs=output) for rule in (TV, ELSEWHERE)]
        with relay.inside():
            owner = (os.geteuid(), os.getegid())
            fleet = Fleet([0], f"frag{os.getpid()}", owner, ["left"], RING_BYTES, Fanout.hash, LevelPolicy())
            try:
                install(fleet, *rules)
                with gen.inside():
                    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                with sender:
                    sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("10.1.0.1"))
                    for _ in range(5):
                        sender.sendto(bytes(5000), ("239.1.1.9", 5001))
                (worker,) = fleet.workers
                assert frames_in(worker.rings[0]) == ["239.1.1.9"] * 5
                assert frames_in(worker.rings[1]) == []
            finally:
                fleet.close()


# --- what is told ------------------------------------------------------------------------------------


class Watched:
    """A watch over the fleet; the records are written as its first worker would."""

    def __init__(self, fleet: Fleet, logging: SupervisorLogging) -> None:
        self.fleet = fleet
        self.ring = logging.rings[Facility.Supervisor]
        self.watch = ProtectionWatch(fleet, logging.logger(Facility.Supervisor))
        self.worker: Worker = fleet.workers[0]
        self.worker.running = True

    def record(self, rule: Rule) -> Any:
        record = self.worker.stats.protections[self.fleet.protections.number_of(rule)]
        record["begun_ns"] = 0
        return record

    def look(self, at_ms: int) -> list[str]:
        self.worker.stats.health["looked_ns"] = at_ms * MS
        self.watch.look()
        return [entry.message for entry in read_all(self.ring)]


@pytest.fixture
def watched(fleet: Fleet) -> Iterator[Watched]:
    with SupervisorLogging(f"protw{os.getpid()}") as logging:
        watched = Watched(fleet, logging)
        yield watched
        watched.worker.running = False


def test_a_silent_leg_is_told_once_and_so_is_its_return(fleet: Fleet, watched: Watched) -> None:
    watched.worker.running = False
    install(fleet, TV)
    watched.worker.running = True
    record = watched.record(TV)
    record["legs"]["last_ns"] = 10_000 * MS
    assert watched.look(10_500) == []
    record["legs"][0]["last_ns"] = 11_400 * MS
    assert watched.look(11_400) == ["Nothing comes by the secondary leg 239.1.1.2:5001 of rule tv: it is not protected"]
    assert watched.look(11_500) == []
    told = health_of(fleet, TV)
    assert told is not None
    assert [leg.delivers for leg in told.legs] == [True, False]
    record["legs"]["last_ns"] = 12_000 * MS
    assert watched.look(12_100) == ["The secondary leg 239.1.1.2:5001 of rule tv delivers again after 2000 ms"]
    assert watched.look(12_200) == []


def test_fail_over_is_told_once_and_so_is_its_end_and_both_if_they_were_quick(fleet: Fleet, watched: Watched) -> None:
    watched.worker.running = False
    install(fleet, STANDBY)
    watched.worker.running = True
    record = watched.record(STANDBY)
    record["legs"]["last_ns"] = 10_000 * MS
    went = "Rule tv went over to its secondary leg 239.1.1.2:5001: nothing came by the primary for longer than 200 ms"
    back = "Rule tv is back on its primary leg 239.1.1.1:5001"
    assert watched.watch.period_s() == 0.1
    assert watched.look(10_000) == []
    record["active"], record["switches"] = 1, 1
    assert watched.look(10_010) == [went]
    assert watched.look(10_020) == []
    record["active"], record["switches"] = 0, 2
    assert watched.look(10_030) == [back]
    record["switches"] = 4
    assert watched.look(10_040) == [went, back]
    assert watched.look(10_050) == []


def test_a_record_of_rubbish_is_told_of_within_bounds(fleet: Fleet, watched: Watched) -> None:
    watched.worker.running = False
    install(fleet, TV, msgspec.structs.replace(STANDBY, rule_id="by", input_port=7))
    watched.worker.running = True
    rubbish = np.random.default_rng(1).bytes(watched.worker.stats.protections.nbytes)
    watched.worker.stats.protections[:] = np.frombuffer(rubbish, layout.PROTECTION)
    for planned in fleet.plan.rules:
        told = health_of(fleet, planned.rule)
        assert told is not None
        assert msgspec.json.decode(msgspec.json.encode(told))["withheld"] >= 0
    watched.look(1000)
