"""One worker as the supervisor sees it: its channel and what waits for room there, its segments, its rings.

Owned by the fleet (fleet.py), over all restarts of the process. Messages are sent in order; what finds no room waits.
"""

import contextlib
import os
import socket
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from logging_shm import SharedMemoryLogManager
from relay.dataplane.copies import Copies
from relay.dataplane.counters import StatsSegment
from relay.dataplane.table import publish
from relay.descriptors import DESCRIPTORS_MAX, Channel, ChannelClosedError
from relay.messages import AddRing, FromWorker, SetSockets, SetTable
from relay.supervisor.health import Lives, Pulse
from relay.supervisor.ingress import FRAME_BYTES
from relay.supervisor.orphans import Predecessor

WAITING_MAX = 1024  # messages to one worker that does not read: three times what the largest change takes


@dataclass
class Worker:
    """The supervisor's side of one worker, over all its restarts."""

    core: int
    stats: StatsSegment
    logs: SharedMemoryLogManager
    copies: Copies
    rings: dict[int, socket.socket] = field(default_factory=dict)  # by ring number
    channel: Channel[FromWorker] | None = None
    pid: int = 0
    restarts: int = 0
    running: bool = False
    started_s: float = 0.0
    generation: int = -1
    pulse: Pulse = field(default_factory=Pulse)
    lives: Lives = field(default_factory=Lives)
    outlives: bool = False  # the process was told to
    hangs: bool = False  # the process was found to, and is being killed
    is_excluded: bool = False  # has no rings: others get its share of the traffic
    predecessor: Predecessor | None = None  # a former supervisor's worker on this core, which still reads the rings
    waiting: deque[tuple[msgspec.Struct, list[int]]] = field(default_factory=deque)  # with descriptors of their own
    is_out_of_step: bool = False  # a message is lost to it: it must be replaced, the next gets everything

    def forget_place(self, ring_number: int) -> None:
        """The ring is no more: what is read under its number next is another."""
        self.stats.header["ring_sent"][ring_number] = 0
        self.copies.forget(ring_number)

    def sign_of_life(self) -> tuple[int, int]:
        """What changes as long as the worker's loop goes round: by the clock, and by what it sends."""
        return int(self.stats.header["heartbeat_ns"]), int(self.stats.header["sends"])

    def send(self, message: msgspec.Struct, descriptors: Sequence[int] = ()) -> None:
        """Send to the worker and ring its doorbell; what finds no room waits until `flush`.

        One that is gone is dealt with when its exit is told.
        """
        if self.is_out_of_step:
            return
        if self.waiting or not self._has_sent(message, descriptors):
            self._put_off(message, descriptors)
        self.stats.ring_doorbell()

    def flush(self) -> None:
        """Send what waits, as far as there is room. In order: a table must not come before its sockets."""
        if not self.waiting:
            return
        while self.waiting and self._has_sent(*self.waiting[0]):
            _, descriptors = self.waiting.popleft()
            for descriptor in descriptors:
                os.close(descriptor)
        self.stats.ring_doorbell()

    def _has_sent(self, message: msgspec.Struct, descriptors: Sequence[int]) -> bool:
        assert self.channel is not None
        try:
            with contextlib.suppress(ChannelClosedError):
                self.channel.send(message, list(descriptors))
        except BlockingIOError:
            return False
        return True

    def _put_off(self, message: msgspec.Struct, descriptors: Sequence[int]) -> None:
        """Keep a message with descriptors of its own: the caller's may be closed before there is room."""
        own: list[int] = []
        self.waiting.append((message, own))
        try:
            for descriptor in descriptors:
                own.append(os.dup(descriptor))
            is_kept = len(self.waiting) <= WAITING_MAX
        except OSError:  # too many are open
            is_kept = False
        if not is_kept:
            self.forget()
            self.is_out_of_step = True

    def forget(self) -> None:
        """Nothing waits any more: the process is gone, or must go."""
        for _, descriptors in self.waiting:
            for descriptor in descriptors:
                os.close(descriptor)
        self.waiting.clear()
        self.is_out_of_step = False

    def hand_ring(self, number: int, ring_bytes: int) -> None:
        """Have a ring of `ring_bytes` read."""
        self.send(AddRing(number, FRAME_BYTES, ring_bytes // FRAME_BYTES), [self.rings[number].fileno()])

    def hand_sockets(self, sockets: Mapping[int, socket.socket]) -> None:
        """Have egress sockets used, by their numbers."""
        numbers = list(sockets)
        for at in range(0, len(numbers), DESCRIPTORS_MAX):
            some = numbers[at : at + DESCRIPTORS_MAX]
            self.send(SetSockets(tuple(some)), [sockets[number].fileno() for number in some])

    def hand_table(self, table: bytes, generation: int) -> None:
        """Have a rule table used."""
        fd = publish(table)
        try:
            self.send(SetTable(generation), [fd])
        finally:
            os.close(fd)
