"""Coalesce and send on a real io_uring and real sockets: whatever is batched, datagrams arrive as they came."""

import socket
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.dataplane import layout, memory
from relay.dataplane.coalesce import add, drain
from relay.dataplane.copies import COPIES_BYTES
from relay.dataplane.table import TableOutput, TableRule, compile_table, view_table
from relay.dataplane.uring import Uring

FAMILIES = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))  # of the outputs of each stream
LO_MTU_PAYLOAD = 65_488
RECEIVE_BUFFER_BYTES = 256 << 20
SO_RCVBUFFORCE = 33
LOG_BYTES = 16_384

# (stream, segment bytes, datagrams of a super-frame, bytes of its last)
TRAINS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 2000), st.integers(1, 70), st.integers(1, 2000)),
    max_size=60,
)


class Sender:
    """The second half of the data path, with an IPv4 and an IPv6 output for each of three streams."""

    def __init__(self, gso_segment_bytes_max: int) -> None:
        self.uring = Uring(memory.SQ_ENTRIES)
        log = np.zeros(LOG_BYTES, np.uint8)
        stats = np.zeros(layout.STATS_BYTES, np.uint8)
        self.memory = memory.Memory(
            self.uring.sqes, self.uring.cqes, stats, np.zeros(COPIES_BYTES, np.uint8), (log, log, log, log)
        )
        self.uring.attach(self.memory.worker)
        self.receivers = [socket.socket(FAMILIES[i % 2][0], socket.SOCK_DGRAM) for i in range(6)]
        self.egress = [socket.socket(family, socket.SOCK_DGRAM) for family, _ in FAMILIES]
        for number, sock in enumerate(self.egress):
            self.memory["egress_fds"]["value"][number] = sock.fileno()
        rules = []
        for stream in range(3):
            outputs = []
            for copy, (_, address) in enumerate(FAMILIES):
                receiver = self.receivers[stream * 2 + copy]
                receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
                receiver.bind((address, 0))
                port = receiver.getsockname()[1]
                outputs.append(TableOutput(stream * 2 + copy, address, port, copy, gso_segment_bytes_max, False, False))
            rules.append(TableRule(stream, f"r{stream}", f"239.0.0.{stream + 1}", 1, None, (0,), False, tuple(outputs)))
        self.table = view_table(compile_table(rules, (), 1))

    def relay(self, trains: list[tuple[int, int, int, int]]) -> list[list[bytes]]:
        """Add trains of datagrams and drain; return what each stream sent."""
        for index in range(len(self.receivers)):
            self.received(index, 10_000)  # what a failed example left
        datagram = np.zeros(1, layout.DATAGRAM)
        sent: list[list[bytes]] = [[], [], []]
        kept = []
        for number, (stream, segment_bytes, count, last_bytes) in enumerate(trains):
            segments = 1 if segment_bytes == 0 else min(count, layout.UDP_PAYLOAD_MAX // segment_bytes)
            size = segment_bytes * (segments - 1) + min(last_bytes, segment_bytes)
            payload = np.frombuffer(np.random.default_rng(number).bytes(max(size, 1)), np.uint8)
            kept.append(payload)
            whole = payload[:size].tobytes()
            sent[stream] += [whole[at : at + segment_bytes] for at in range(0, size, segment_bytes)] if size else [b""]
            datagram[0]["datagrams"] = segments
            datagram[0]["segment_bytes"] = segment_bytes if segments > 1 else size
            datagram[0]["payload_bytes"] = size
            datagram[0]["payload"] = payload.ctypes.data
            add(self.memory.worker, self.table.view, stream, datagram[0])
        drain(self.memory.worker, self.table.view)
        return sent

    def received(self, index: int, count: int) -> list[bytes]:
        """What a receiver got; loopback delivers before the send completes."""
        payloads = []
        for _ in range(count + 1):
            try:
                payloads.append(self.receivers[index].recv(65_536, socket.MSG_DONTWAIT))
            except BlockingIOError:
                break
        return payloads

    def close(self) -> None:
        for sock in (*self.egress, *self.receivers):
            sock.close()
        self.uring.close()


@pytest.fixture(scope="module", params=[LO_MTU_PAYLOAD, 0], ids=["segmented", "sent singly"])
def sender(request: pytest.FixtureRequest) -> Iterator[Sender]:
    sender = Sender(request.param)
    yield sender
    sender.close()


@settings(max_examples=60)
@given(trains=TRAINS)
def test_every_output_gets_every_datagram_in_order(sender: Sender, trains: list[tuple[int, int, int, int]]) -> None:
    sent = sender.relay(trains)
    for index in range(6):
        expected = sent[index // 2]
        assert sender.received(index, len(expected)) == expected
    stats = sender.memory["stats"][0]
    outputs = sender.memory["output_stats"]
    assert stats["deliveries"] == outputs["packets"].sum() + outputs["drops_full"].sum() + outputs["drops_error"].sum()
    assert stats["packets_relayed"] == outputs["packets"].sum()
    assert stats["drops"].sum() == 0
