"""Two legs become one: each datagram once, in order of first arrival, whatever each leg loses, doubles or delays."""

import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.dataplane import layout, memory
from relay.dataplane.coalesce import drain
from relay.dataplane.copies import COPIES_BYTES
from relay.dataplane.protect import MISORDER_MAX, STEP_NS, empty_record, lets_through, relay_protected, take_back
from relay.dataplane.table import TableOutput, TableProtection, TableRule, compile_table, view_table
from relay.dataplane.uring import Uring
from relay.errors import RuleError
from tests.relay.dataplane.test_coalesce import (
    LO_MTU_PAYLOAD,
    LOG_BYTES,
    LOOPBACK,
    RECEIVE_BUFFER_BYTES,
    SO_RCVBUFFORCE,
)

RECORD = 7
STALL_NS = 100_000_000
PAYLOAD_BYTES = 24
PRIMARY, SECONDARY = 0, 1
SSRC = 0xABCD

Arrival = tuple[int, int]  # leg, sequence number


def rtp(sequence: int, ssrc: int = SSRC) -> bytes:
    header = struct.pack(">BBHII", 0x80, 33, sequence & 0xFFFF, sequence & 0xFFFFFFFF, ssrc)
    return header.ljust(PAYLOAD_BYTES, bytes([sequence & 0xFF]))


class Merger:
    """The second half of the data path: a protected rule, another on its primary input, and a receiver for each."""

    def __init__(self, mode: int, is_shared: bool = True) -> None:
        self.uring = Uring(memory.SQ_ENTRIES)
        log = np.zeros(LOG_BYTES, np.uint8)
        self.stats = np.zeros(layout.STATS_BYTES, np.uint8)
        self.memory = memory.Memory(
            self.uring.sqes, self.uring.cqes, self.stats, np.zeros(COPIES_BYTES, np.uint8), (log, log, log, log)
        )
        self.uring.attach(self.memory.worker)
        self.receivers = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2)]
        self.egress = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.memory["egress_fds"]["value"][0] = self.egress.fileno()
        outputs = []
        for slot, receiver in enumerate(self.receivers):
            receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
            receiver.bind(("127.0.0.1", 0))
            port = receiver.getsockname()[1]
            outputs.append((TableOutput(slot, LOOPBACK, port, 0, LO_MTU_PAYLOAD, False, False),))
        rules = [
            TableRule(
                0,
                "both",
                100 + leg,
                1,
                0,
                (0,),
                False,
                outputs[0],
                protection=TableProtection(RECORD, leg, mode, STALL_NS),
            )
            for leg in (PRIMARY, SECONDARY)
        ]
        if is_shared:
            rules.append(TableRule(1, "other", 100, 1, 0, (0,), False, outputs[1]))
        self.table = view_table(compile_table(rules, (), 1))
        self.worker = self.memory.worker
        self.datagram = np.zeros(1, layout.DATAGRAM)[0]
        self.buffers: list[Any] = []
        self.forget()

    def forget(self) -> None:
        """Begin with a record of which nothing is known."""
        self.memory["protections"][RECORD] = empty_record()
        self.memory["journal"]["count"] = 0
        self.memory["merging"]["value"] = 0
        self.worker["now_ns"] = 10 * STEP_NS
        self.memory["protections"][RECORD]["begun_ns"] = self.worker["now_ns"]
        for index in range(2):
            self.received(index)

    @property
    def record(self) -> Any:
        return self.memory["protections"][RECORD]

    def take(self, leg: int, payloads: Sequence[bytes], received_ns: int | None = None) -> int:
        """Take a frame of equal datagrams that came by a leg; how many of them leave."""
        buffer = np.frombuffer(b"".join(payloads), np.uint8)
        self.buffers.append(buffer)  # must live until the drain
        self.datagram["datagrams"] = len(payloads)
        self.datagram["segment_bytes"] = len(payloads[0])
        self.datagram["payload_bytes"] = len(buffer)
        self.datagram["payload"] = memory.address_of(buffer)
        self.datagram["received_ns"] = int(self.worker["now_ns"]) if received_ns is None else received_ns
        return int(relay_protected(self.worker, self.table.view, leg, self.datagram))

    def send(self) -> None:
        drain(self.worker, self.table.view)
        self.buffers.clear()

    def die(self) -> None:
        """What was to be sent is not."""
        self.worker["sq_tail"] -= self.worker["queued"]
        self.worker["batch_count"] = self.worker["queued"] = self.worker["retry_count"] = 0
        self.worker["window"] += 1
        self.buffers.clear()

    def received(self, index: int = 0) -> list[bytes]:
        """What a receiver has got; loopback delivers before a send completes."""
        got = []
        while True:
            try:
                got.append(self.receivers[index].recv(4096, socket.MSG_DONTWAIT))
            except BlockingIOError:
                return got

    def close(self) -> None:
        for sock in (self.egress, *self.receivers):
            sock.close()
        self.uring.close()


@pytest.fixture(scope="module")
def merger() -> Iterator[Merger]:
    merger = Merger(layout.SEAMLESS)
    yield merger
    merger.close()


@pytest.fixture
def standby() -> Iterator[Merger]:
    merger = Merger(layout.FAILOVER)
    yield merger
    merger.close()


def frames(arrivals: Sequence[Arrival], longest: int) -> Iterator[tuple[int, list[int]]]:
    """Arrivals as frames: neighbours of one leg together, up to so many."""
    leg, run = PRIMARY, list[int]()
    for at, sequence in arrivals:
        if run and (at != leg or len(run) == longest):
            yield leg, run
            run = []
        leg = at
        run.append(sequence)
    if run:
        yield leg, run


@st.composite
def two_legs(draw: st.DrawFn) -> list[Arrival]:
    """What two legs bring of one stream: each loses, doubles and delays some, and one is behind the other."""
    count = draw(st.integers(1, 120))
    first = draw(st.sampled_from((0, 1, 30_000, 65_535, 65_536 - count // 2, 32_768 - count // 2)))
    events = []
    for leg in (PRIMARY, SECONDARY):
        lag = draw(st.integers(0, 60))
        fates = draw(st.lists(st.sampled_from("......lld2"), min_size=count, max_size=count))
        for i, fate in enumerate(fates):
            late = draw(st.integers(1, 20)) if fate == "d" else 0
            if fate != "l":
                events += [(i + lag + late, leg, first + i)] * (2 if fate == "2" else 1)
    events.sort(key=lambda event: event[:2])
    return [(leg, sequence) for _, leg, sequence in events]


@settings(max_examples=150, deadline=None)
@given(arrivals=two_legs(), longest=st.integers(1, 40), drained_every=st.integers(1, 30))
def test_what_either_leg_has_leaves_once_in_order_of_first_arrival(
    merger: Merger, arrivals: list[Arrival], longest: int, drained_every: int
) -> None:
    merger.forget()
    withheld = int(merger.memory["stats"][0]["packets_withheld"])
    for number, (leg, sequences) in enumerate(frames(arrivals, longest)):
        merger.take(leg, [rtp(sequence) for sequence in sequences])
        if number % drained_every == 0:
            merger.send()
    merger.send()
    assert merger.received() == [rtp(sequence) for sequence in dict.fromkeys(sequence for _, sequence in arrivals)]
    # The other rule on the primary's input gets all of it, as it came, and nothing of the secondary's.
    assert merger.received(1) == [rtp(sequence) for leg, sequence in arrivals if leg == PRIMARY]
    merged = len({sequence for _, sequence in arrivals})
    assert merger.memory["stats"][0]["packets_withheld"] - withheld == len(arrivals) - merged
    assert merger.record["withheld"] == len(arrivals) - merged
    assert merger.record["legs"]["packets"].sum() == len(arrivals)
    assert merger.record["legs"]["firsts"].sum() == merged
    assert merger.memory["journal"][0]["count"] == 0


@settings(max_examples=60, deadline=None)
@given(arrivals=two_legs(), longest=st.integers(1, 40), killed_at=st.integers(0, 200))
def test_a_killed_workers_successor_loses_and_doubles_nothing(
    merger: Merger, arrivals: list[Arrival], longest: int, killed_at: int
) -> None:
    """It finds the frames that were not sent in the ring again, and the bits of what they held taken back."""
    merger.forget()
    whole = list(frames(arrivals, longest))
    sent = min(killed_at, len(whole))
    for leg, sequences in whole[:sent]:
        merger.take(leg, [rtp(sequence) for sequence in sequences])
    merger.send()
    got = merger.received()
    unsent = whole[sent:]
    for leg, sequences in unsent[: 1 + len(unsent) // 2]:
        merger.take(leg, [rtp(sequence) for sequence in sequences])
    merger.die()
    merger.received()  # what a queue that was full, or a first segmented send, had it send at once
    take_back(merger.memory["protections"], merger.memory["journal"][0])
    for leg, sequences in unsent:
        merger.take(leg, [rtp(sequence) for sequence in sequences])
    merger.send()
    got += merger.received()
    assert sorted(got) == sorted({rtp(sequence) for _, sequence in arrivals})
    merger.received(1)


def judged(merger: Merger, leg: int, sequence: int, ssrc: int = SSRC) -> bool:
    buffer = np.frombuffer(rtp(sequence, ssrc), np.uint8)
    merger.memory["journal"]["count"] = 0
    merger.record["legs"][leg]["last_ns"] = merger.worker["now_ns"]
    return bool(lets_through(merger.worker, RECORD, leg, memory.address_of(buffer), len(buffer)))


def test_a_leg_may_be_a_window_behind(merger: Merger) -> None:
    merger.forget()
    skew, count = 30_000, 70_000  # over the end of the sequence numbers
    passed = np.zeros(count, np.int64)
    for i in range(count + skew):
        if i < count and i % 10:
            passed[i] += judged(merger, PRIMARY, i)
        if i >= skew and (i - skew) % 7:
            passed[i - skew] += judged(merger, SECONDARY, i - skew)
    lost_by_both = np.arange(count) % 70 == 0
    assert (passed == ~lost_by_both).all()
    legs = merger.record["legs"]
    assert legs["expected"].tolist() == [count - 1, count - 1]  # neither had the first one
    assert merger.record["switches"] == 0


def test_what_is_older_than_the_window_is_withheld(merger: Merger) -> None:
    merger.forget()
    assert judged(merger, PRIMARY, 0)
    assert judged(merger, PRIMARY, 32_767)
    assert not judged(merger, PRIMARY, 0)
    assert judged(merger, SECONDARY, 1)
    assert judged(merger, PRIMARY, 32_768)
    assert not judged(merger, SECONDARY, 0)


def test_a_new_ssrc_is_believed_at_its_second_datagram_and_the_other_leg_doubles_nothing(merger: Merger) -> None:
    merger.forget()
    for sequence in range(100):
        assert judged(merger, PRIMARY, sequence)
    for sequence in range(90):
        assert not judged(merger, SECONDARY, sequence)
    assert not judged(merger, PRIMARY, 5000, ssrc=9)
    assert judged(merger, PRIMARY, 5001, ssrc=9)
    assert [judged(merger, SECONDARY, sequence) for sequence in range(90, 100)] == [False] * 10
    assert judged(merger, SECONDARY, 5000, ssrc=9)  # which the primary's was not believed for
    assert not judged(merger, SECONDARY, 5001, ssrc=9)
    assert judged(merger, SECONDARY, 5002, ssrc=9)
    assert merger.record["switches"] == 1


@pytest.mark.parametrize("back", [MISORDER_MAX + 1, 30_000])
def test_a_sender_that_begins_anew_is_followed_on_both_legs(merger: Merger, back: int) -> None:
    merger.forget()
    for sequence in range(40_000, 40_100):
        judged(merger, PRIMARY, sequence)
        judged(merger, SECONDARY, sequence - 20)
    anew = 40_100 - back
    assert not judged(merger, PRIMARY, anew)
    assert [judged(merger, PRIMARY, anew + i) for i in range(1, 50)] == [True] * 49
    assert [judged(merger, SECONDARY, 40_080 + i) for i in range(20)] == [False] * 20  # of before, doubled
    assert [judged(merger, SECONDARY, anew + i) for i in range(50)] == [False] * 50
    assert judged(merger, SECONDARY, anew + 50)  # in step again
    assert judged(merger, PRIMARY, anew + 51)


def test_one_datagram_from_nowhere_changes_nothing(merger: Merger) -> None:
    merger.forget()
    assert judged(merger, PRIMARY, 40_000)
    for sequence in range(40_001, 40_200):
        assert not judged(merger, SECONDARY, sequence - 30_000, ssrc=5)
        assert judged(merger, PRIMARY, sequence)
        assert not judged(merger, PRIMARY, 3 * sequence, ssrc=6)
    assert merger.record["switches"] == 0


def test_a_leg_that_carries_another_stream_is_let_in_when_it_is_the_only_one(merger: Merger) -> None:
    merger.forget()
    for sequence in range(100):
        assert judged(merger, PRIMARY, sequence)
        assert not judged(merger, SECONDARY, 7000 + sequence, ssrc=9)
    merger.worker["now_ns"] += STEP_NS + 1
    assert judged(merger, SECONDARY, 7100, ssrc=9)
    assert judged(merger, SECONDARY, 7101, ssrc=9)
    assert not judged(merger, PRIMARY, 100)


def test_a_leg_out_of_step_is_let_in_when_it_is_where_the_other_is(merger: Merger) -> None:
    """Else one leg's hiccup would have the other withheld for ever."""
    merger.forget()
    for sequence in range(40_000, 40_010):
        judged(merger, PRIMARY, sequence)
        judged(merger, SECONDARY, sequence)
    for sequence in (20_000, 20_001, 40_010, 40_011):  # astray and back
        judged(merger, PRIMARY, sequence)
    merger.worker["now_ns"] += STEP_NS + 1
    judged(merger, PRIMARY, 40_012)
    assert judged(merger, SECONDARY, 40_013)


def test_what_is_no_rtp_passes_from_the_primary_alone(merger: Merger) -> None:
    merger.forget()
    assert merger.take(PRIMARY, [b"no RTP"]) == 1
    assert merger.take(SECONDARY, [b"no RTP"]) == 0
    assert merger.take(SECONDARY, [b""]) == 0
    merger.send()
    assert merger.received() == [b"no RTP"]
    assert merger.record["not_rtp"] == 3
    assert merger.received(1) == [b"no RTP"]


def test_two_protected_rules_do_not_share_an_input() -> None:
    rules = [
        TableRule(slot, f"r{slot}", 100, 1, 0, (0,), False, (), protection=TableProtection(slot, 0, layout.SEAMLESS))
        for slot in (0, 1)
    ]
    with pytest.raises(RuleError, match="rules r0 and r1 both protect"):
        compile_table(rules, (), 1)


def test_a_journal_of_rubbish_is_harmless() -> None:
    generator = np.random.default_rng(1)
    protections = np.zeros(layout.PROTECTIONS_MAX, layout.PROTECTION)
    journal = np.zeros(1, layout.JOURNAL)
    journal["entries"] = generator.integers(-(1 << 63), (1 << 63) - 1, layout.JOURNAL_ENTRIES)
    for count in (-5, 1 << 60, 1000):
        journal["count"] = count
        take_back(protections, journal[0])
        assert journal["count"] == 0


# --- fail-over ---------------------------------------------------------------------------------------


def step(merger: Merger, ms: float, *legs: int) -> list[int]:
    """Time goes on, and a datagram comes by each of these legs, in this order; the legs that are relayed."""
    merger.worker["now_ns"] += int(ms * 1e6)
    for leg in legs:
        merger.take(leg, [bytes([leg]) * 20])
    merger.send()
    return [datagram[0] for datagram in merger.received()]


def test_the_secondary_takes_over_from_a_silent_primary_and_hands_back_when_it_is_steady(standby: Merger) -> None:
    for _ in range(20):
        assert step(standby, 10, PRIMARY, SECONDARY) == [PRIMARY]
    relayed = [step(standby, 10, SECONDARY) for _ in range(15)]
    assert relayed == [[]] * 10 + [[SECONDARY]] * 5
    for _ in range(10):  # it is back, but not yet for as long as a stall
        assert step(standby, 10, PRIMARY, SECONDARY) == [SECONDARY]
    assert step(standby, 10, PRIMARY, SECONDARY) == [PRIMARY]
    assert step(standby, 10, PRIMARY, SECONDARY) == [PRIMARY]
    assert standby.record["switches"] == 2
    assert len(standby.received(1)) == 32  # the other rule has the primary's, all of it


def test_a_primary_that_comes_and_goes_does_not_flap(standby: Merger) -> None:
    step(standby, 10, PRIMARY, SECONDARY)
    for _ in range(15):
        step(standby, 10, SECONDARY)
    for _ in range(5):
        for _ in range(5):
            assert step(standby, 10, PRIMARY, SECONDARY) == [SECONDARY]
        for _ in range(15):
            assert step(standby, 10, SECONDARY) == [SECONDARY]
    assert standby.record["switches"] == 1


def test_a_primary_that_is_back_is_relayed_at_once_where_the_secondary_is_silent(standby: Merger) -> None:
    step(standby, 10, PRIMARY, SECONDARY)
    for _ in range(15):
        step(standby, 10, SECONDARY)
    assert step(standby, 150, PRIMARY) == [PRIMARY]


def test_a_pause_of_the_sender_is_no_reason_to_switch(standby: Merger) -> None:
    step(standby, 10, PRIMARY, SECONDARY)
    assert step(standby, 5000, SECONDARY, PRIMARY) == [PRIMARY]
    assert standby.record["switches"] == 0


def test_a_worker_that_stood_still_does_not_switch(standby: Merger) -> None:
    """What came meanwhile by the primary waits in another ring, and is read after the secondary's."""
    for _ in range(20):
        step(standby, 10, PRIMARY, SECONDARY)
    now_ns = int(standby.worker["now_ns"])
    for i in range(1, 51):
        standby.take(SECONDARY, [b"s" * 20], now_ns + i * 10_000_000)
    for i in range(1, 51):
        standby.take(PRIMARY, [b"p" * 20], now_ns + i * 10_000_000)
    standby.send()
    assert standby.received() == [b"p" * 20] * 50
    standby.worker["now_ns"] += 500_000_000
    assert step(standby, 10, SECONDARY, PRIMARY) == [PRIMARY]


def test_a_successor_waits_for_the_primary_before_it_switches(standby: Merger) -> None:
    for _ in range(20):
        step(standby, 10, PRIMARY, SECONDARY)
    standby.worker["now_ns"] += 3 * STALL_NS  # nobody read the rings
    standby.worker["rings_since_ns"] = standby.worker["now_ns"]
    assert step(standby, 1, SECONDARY, PRIMARY) == [PRIMARY]
    assert standby.record["switches"] == 0


def test_a_wall_clock_that_is_set_back_prevents_no_switch(standby: Merger) -> None:
    step(standby, 10, PRIMARY, SECONDARY)
    for _ in range(12):
        standby.worker["now_ns"] += 10_000_000
        standby.take(SECONDARY, [b"s" * 20], int(standby.worker["now_ns"]) - 3_600_000_000_000)
    standby.send()
    assert standby.received() == [b"s" * 20] * 2
