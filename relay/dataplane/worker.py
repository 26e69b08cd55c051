"""The worker: one process a core. Runs the compiled loop and, between two passes, obeys the supervisor.

Forked from the template, unprivileged. Owns its io_uring and its memory; is handed packet sockets, egress
sockets and rule tables. Writes its stats segment and its four log rings. Ends when it is told to, after it has
relayed what the rings still hold. Without a supervisor it goes on relaying until the next one releases it, once
that one could (`Outlive`); before that it ends and leaves what the rings hold to its successor.
"""

import contextlib
import ctypes
import mmap
import os
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from logging_shm import DataPlaneLogging, Facility
from relay.confinement.roles import confine_worker
from relay.dataplane import layout, loop, memory, streams
from relay.dataplane.copies import COPY_SLOTS, map_copies
from relay.dataplane.counters import StatsSegment
from relay.dataplane.guard_cells import map_guard_cells
from relay.dataplane.memory import address_of
from relay.dataplane.protect import take_back
from relay.dataplane.ring import find_cursor, resume_copies
from relay.dataplane.table import compile_table, map_table, view_table
from relay.dataplane.uring import Uring
from relay.descriptors import Channel, ChannelClosedError
from relay.messages import (
    AddRing,
    CloseSockets,
    Drain,
    Outlive,
    RemoveRing,
    SetGuardCells,
    SetSockets,
    SetTable,
    Spawn,
    Started,
    TableInUse,
    ToWorker,
)

IDLE_MODES = {"adaptive": loop.IDLE_ADAPTIVE, "sleep": loop.IDLE_SLEEP, "spin": loop.IDLE_SPIN}
STREAM_HEALTH = {"off": streams.OFF, "rtp": streams.ONLY_RTP, "full": streams.FULL}
SPIN_NS = 100_000  # twice a wake-up here, while datagrams come that near to each other
NAP_NS = 50_000  # 2.3 M packets/s a core with it, 1.2 M without; adds at most as much latency
PR_SET_TIMERSLACK = 29
SO_ATTACH_FILTER = 26
NO_DESCRIPTOR = -1  # poll(2) ignores it
REJECT_ALL = struct.pack("HBBI", 0x06, 0, 0, 0)  # BPF_RET | BPF_K


class Worker:
    """State of the worker process outside compiled code."""

    def __init__(self, spawn: Spawn, channel: Channel[Any], copies: Any) -> None:
        core, instance = spawn.core, spawn.instance
        self.core = core
        self.channel = channel
        self.logging = DataPlaneLogging.attach(core, instance=instance)
        self.log = self.logging.logger(Facility.DataPlane)
        self.stats = StatsSegment.attach(core, instance)
        self.uring = Uring(memory.SQ_ENTRIES)
        segments = tuple(
            self.logging.segment(facility)
            for facility in (Facility.DataPlane, Facility.Ingress, Facility.Egress, Facility.BufferPool)
        )
        self.memory = memory.Memory(self.uring.sqes, self.uring.cqes, self.stats.bytes, copies, segments)
        self.table = view_table(compile_table((), (), 0))
        self.outlives = self.is_restart = False
        self.rings: dict[int, tuple[socket.socket, mmap.mmap]] = {}
        state = self.memory.worker
        self.uring.attach(state)
        state["control_fd"] = channel.fileno()
        state["idle_mode"] = IDLE_MODES[spawn.idle]
        state["stream_health"] = STREAM_HEALTH[spawn.stream_health]
        state["spin_ns"] = SPIN_NS
        state["nap_ns"] = NAP_NS
        streams.rebuild_index(state)
        state["doorbell_seen"] = self.stats.header["doorbell"]
        self.memory["reported"]["value"] = self.stats.header["drops"]
        take_back(self.stats.protections, self.stats.journal)
        self.stats.header["pid"] = os.getpid()

    def run(self) -> None:
        """Relay until told to end."""
        self.log.info(f"Data plane worker started on core {self.core}")
        self.tell(Started())
        while True:
            reason = loop.run(self.memory.worker, self.table.view)
            if reason == loop.DRAINED:
                return
            # Read before what it announces, or a release that comes between the two looks would never be seen.
            doorbell = int(self.stats.header["doorbell"])
            released = int(self.stats.header["release"])
            if released == layout.RELEASE_NOW:
                self.log.info("Released: another worker goes on")
                return
            if released == layout.RELEASE_DRAINED:
                self.close_ingress()
            self.memory.worker["doorbell_seen"] = doorbell
            try:
                self.obey()
            except ChannelClosedError:
                if not self.outlives:
                    self.log.error("The supervisor is gone, and nothing is prepared for the next one")
                    return
                if self.is_restart:
                    self.log.notice("The supervisor starts anew: relaying goes on")
                else:
                    self.log.warning("The supervisor is gone: relaying goes on under the rules that it left")
                self.memory.worker["control_fd"] = NO_DESCRIPTOR

    def obey(self) -> None:
        """Carry out the supervisor's messages that wait."""
        if self.memory.worker["control_fd"] == NO_DESCRIPTOR:
            return
        while True:
            try:
                message, descriptors = self.channel.receive()
            except BlockingIOError:
                return
            self.stats.header["heartbeat_ns"] = time.monotonic_ns()  # many messages take longer than the loop's timer
            self.carry_out(message, descriptors)

    def carry_out(self, message: Any, descriptors: Sequence[int]) -> None:
        """Do what one message of the supervisor says."""
        match message:
            case AddRing():
                self.add_ring(message, descriptors[0])
            case RemoveRing():
                self.remove_ring(message.index)
            case SetSockets():
                for number, descriptor in zip(message.numbers, descriptors, strict=True):
                    self.set_socket(number, descriptor)
            case CloseSockets():
                for number in message.numbers:
                    self.set_socket(number, -1)
            case Outlive():
                self.outlives, self.is_restart = True, message.is_restart
            case Drain():
                self.log.info("Supervisor stream closed, sending shutdown to data plane")
                self.close_ingress()
            case SetGuardCells():
                self.memory.use_guard_cells(map_guard_cells(descriptors[0]))
                os.close(descriptors[0])
            case SetTable():
                self.relay_what_came()
                self.table = map_table(descriptors[0])
                os.close(descriptors[0])
                streams.prune(self.memory.worker, self.table.view)
                self.stats.header["generation_seen"] = self.table.generation
                self.tell(TableInUse(self.table.generation))

    def tell(self, message: msgspec.Struct) -> None:
        """Tell the supervisor; that it is gone is noticed when what it has sent before is read."""
        with contextlib.suppress(ChannelClosedError):
            self.channel.send(message)

    def relay_what_came(self) -> None:
        """Under the rules that were: an input may be another ring's after a change, and was admitted here until now."""
        loop.run_pass(self.memory.worker, self.table.view)

    def set_socket(self, number: int, descriptor: int) -> None:
        """Put an egress socket under its number, or none with -1; nothing is in flight between passes."""
        former = int(self.memory["egress_fds"]["value"][number])
        if former >= 0:
            os.close(former)
        self.memory["egress_fds"]["value"][number] = descriptor
        self.memory["gso_states"]["value"][number] = 0

    def add_ring(self, message: AddRing, descriptor: int) -> None:
        """Map a packet ring and go on where its last reader left off."""
        self.remove_ring(message.index)
        ring_bytes = message.frame_bytes * message.frame_count
        mapped = mmap.mmap(descriptor, ring_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        base = address_of(np.frombuffer(mapped, np.uint8))
        ring = self.memory["rings"][message.index]
        ring["fd"] = descriptor
        ring["base"] = base
        ring["frame_bytes"] = message.frame_bytes
        ring["frames"] = message.frame_count
        ring["cursor"] = find_cursor(
            base,
            message.frame_count,
            message.frame_bytes,
            int(self.stats.header["ring_sent"][message.index]) % message.frame_count,
        )
        ring["taken"] = ring["fill_level"] = 0
        ring["fill_due"] = 1
        self.memory.link_copies(message.index)
        resume_copies(self.memory.worker, message.index)
        ring["active"] = 1
        self.memory.worker["rings_since_ns"] = time.monotonic_ns()
        self.rings[message.index] = (socket.socket(fileno=descriptor), mapped)

    def remove_ring(self, index: int) -> None:
        """Let go of a ring whose interface is gone, or that is no more needed."""
        if index not in self.rings:
            return
        self.relay_what_came()
        held = self.rings.pop(index)
        self.memory["rings"][index]["active"] = 0
        self.stats.header["ring_sent"][index] = 0
        self.stats.header["ring_fill_percent"][index] = 0
        self.memory["copy_mmsg"]["msg_len"][index * COPY_SLOTS] = 0
        held[0].close()

    def close_ingress(self) -> None:
        """Let nothing more into the rings, so that draining them ends."""
        code = ctypes.create_string_buffer(REJECT_ALL)
        program = struct.pack("HxxxxxxP", 1, ctypes.addressof(code))
        for packet_socket, _ in self.rings.values():
            packet_socket.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
        self.memory.worker["draining"] = 1


def main(spawn: Spawn, end: socket.socket, copies: int) -> None:
    """Run a worker in this process until it is told to end. `copies` is the descriptor of its copy arena."""
    os.sched_setaffinity(0, {spawn.core})
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)
    end.setblocking(False)
    worker = Worker(spawn, Channel(end, ToWorker), map_copies(copies))
    os.close(copies)
    if not confine_worker():
        worker.log.warning("No seccomp filter: this kernel or machine has none for it")
    try:
        worker.run()
    finally:
        worker.uring.close()
        worker.logging.shutdown()
