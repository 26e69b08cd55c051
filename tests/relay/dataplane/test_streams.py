"""The table of streams: bounded, found again, given up to others, recognised; whatever comes, memory stays as it is."""

import itertools
import struct
from typing import Any

import numpy as np

from relay.dataplane import layout, memory, streams
from relay.dataplane.memory import address_of
from relay.dataplane.table import TableRule, compile_table, view_table
from tests.relay.dataplane.bare import addressed, bare_memory

S = 1_000_000_000
GROUP, PORT, SOURCE = "ff3e::8000:1", 5001, "2001:db8::7"
CELL = b"\x47\x01\x00\x10".ljust(188, b"\xff")


class Worker:
    """What of a worker deals with streams."""

    def __init__(self) -> None:
        self.memory = bare_memory()
        self.memory.worker["stream_health"] = streams.FULL
        self.flow = np.zeros(1, memory.FLOW)[0]
        self.health = self.memory["health"][0]

    def take(
        self, payload: bytes = b"x", sport: int = 4000, dport: int = PORT, at_ns: int = S, segment_bytes: int = 0
    ) -> Any:
        """Observe a datagram of a flow that is new to the flow cache; return its record, or None."""
        data = np.frombuffer(payload, np.uint8).copy()
        datagram = addressed(SOURCE, GROUP, sport, dport)
        segment_bytes = segment_bytes or len(payload)
        values = (8, -(-len(payload) // segment_bytes), segment_bytes, len(payload), address_of(data), at_ns)
        for name, value in zip((layout.DATAGRAM.names or ())[6:], values, strict=True):
            datagram[name] = value
        self.memory.worker["now_ns"] = at_ns
        self.flow["stream"] = memory.STREAM_UNSOUGHT
        streams.observe(self.memory.worker, self.flow, datagram, 0)
        return self.memory["streams"][self.flow["stream"]] if self.flow["stream"] >= 0 else None

    def used(self) -> int:
        return int((self.memory["streams"]["number"] > 0).sum())


def test_a_streams_datagrams_are_counted_in_one_record() -> None:
    worker = Worker()
    for i in range(5):
        worker.take(b"four", at_ns=S + i)
    record = worker.take(bytes(2500), segment_bytes=1000, at_ns=2 * S)
    assert worker.used() == 1
    assert (record["packets"], record["bytes"]) == (8, 2520)
    assert (record["first_ns"], record["last_ns"]) == (S, 2 * S)
    assert (record["gaps"], record["gap_ns"]) == (1, S - 4)


def test_more_streams_than_there_is_room_for_are_counted_until_others_fall_silent() -> None:
    worker = Worker()
    for sport in range(1, layout.STREAMS_MAX + 501):
        worker.take(sport=sport)
    assert worker.used() == layout.STREAMS_MAX
    assert worker.health["frames_untracked"] == 500
    assert worker.take(sport=1)["packets"] == 2
    later_ns = 2 * S + streams.SILENT_NS
    worker.take(sport=1, at_ns=later_ns)
    newcomer = worker.take(sport=60_000, at_ns=later_ns)
    assert (newcomer["sport"], newcomer["packets"]) == (60_000, 1)
    assert worker.used() == layout.STREAMS_MAX
    assert worker.health["streams_evicted"] == 1
    assert worker.take(sport=1, at_ns=later_ns)["packets"] == 4  # found again in the new index


def test_every_stream_is_found_again_after_its_worker_was_replaced() -> None:
    worker = Worker()
    for sport in range(1, 301):
        worker.take(sport=sport)
    successor = bare_memory()
    successor["streams"][:] = worker.memory["streams"]
    worker.memory = successor
    streams.rebuild_index(successor.worker)
    successor.worker["stream_health"] = streams.FULL
    for sport in range(1, 301):
        assert worker.take(sport=sport)["packets"] == 2
    assert worker.used() == 300


def test_streams_that_no_rule_asks_for_are_forgotten() -> None:
    worker = Worker()
    for sport, dport in itertools.product((1, 2, 3), (PORT, PORT + 1)):
        worker.take(sport=sport, dport=dport)
    rule = TableRule(0, "r", GROUP, PORT, None, (0,), False, ())
    table = view_table(compile_table([rule], (), 1))
    streams.prune(worker.memory.worker, table.view)
    assert worker.used() == 3
    assert worker.take(sport=2)["packets"] == 2
    assert worker.take(sport=2, dport=PORT + 1)["packets"] == 1


def rtp(sequence: int, content: bytes) -> bytes:
    return struct.pack(">BBHII", 0x80, 33, sequence & 0xFFFF, sequence * 900 & 0xFFFFFFFF, 7) + content


def test_what_a_stream_carries_is_recognised_and_forgotten_again() -> None:
    worker = Worker()
    kinds = []
    for i in range(4):
        kinds.append(int(worker.take(rtp(i, b"audio"))["kind"]))
    for i in range(4, 14):
        kinds.append(int(worker.take(rtp(i, CELL))["kind"]))
    assert kinds == [0, 0, 0, 1, *[1] * 9, 3]
    for _ in range(64):
        record = worker.take(b"something else")
    assert (record["kind"], record["malformed"]) == (0, 64)
    for _ in range(2):
        record = worker.take(CELL * 7)
    assert record["kind"] == 2
    record = worker.take(bytes(188 * 701))
    assert (record["kind"], record["sync_losses"]) == (0, 1)


def test_only_datagrams_are_counted_where_nothing_is_looked_into() -> None:
    worker = Worker()
    worker.memory.worker["stream_health"] = streams.ONLY_RTP
    for _ in range(5):
        record = worker.take(CELL * 7)
    assert record["kind"] == 0
    worker.memory.worker["stream_health"] = streams.OFF
    worker.take(CELL * 7)
    assert record["packets"] == 5
