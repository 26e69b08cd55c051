"""The relay's data path over a ring that is filled as the kernel fills one, each frame between inaccessible pages.

    python -m tests.fuzz.datapath --seed 1 --frames 200000 --progress FILE

Real are the compiled pass, the io_uring and the sockets on loopback; made up is only who fills the ring. After each
pass every counter is what the oracle says, and every receiver has got every datagram, unaltered, and nothing else. A
frame that fits a slot ends at the last byte before an inaccessible page; so does a fetched copy in its arena.

Ends with status 1 and a line about the first frame that was treated wrongly. FILE tells how far it came: the pass, and
the frame where a pass is repeated frame by frame.
"""

import argparse
import socket
import struct
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from logging_shm.atomics import store_release_u32, store_u8, store_u16, store_u32
from logging_shm.jit import compiled
from relay.dataplane import copies, layout, memory, mpegts, streams
from relay.dataplane.coalesce import drain
from relay.dataplane.layout import DropCause
from relay.dataplane.loop import run_pass
from relay.dataplane.table import OwnSource, TableOutput, TableRule, compile_table, view_table
from relay.dataplane.uring import Uring
from tests.fuzz import frames, oracle
from tests.fuzz.children import Progress
from tests.fuzz.guarded import PAGE, Guarded

SLOTS = 512
FRAMES_OF_PASS = SLOTS // 2  # as many as a pass takes
BIG_EVERY = 64  # passes, one of which has frames that fit no slot
BIG_MAX = 10  # in a pass: a UNIX socket queues no more
BIG_SNAPLEN = 2048
TP_MAC_MIN = 96  # TPACKET_ALIGN of both headers, and room for the virtio header
TRAILER_BYTES = 10  # the virtio header before a frame
LOG_BYTES = 16_384
LOOPBACK, LOOPBACK6 = "127.0.0.1", "::1"
RECEIVE_BUFFER_BYTES = 512 << 20
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33
IP_RECVTTL = 12

# Receivers, and which of them are of IPv6, and which are told the TTL
PLAIN, VARIED, DECREMENTED, FROM_SOURCE, FROM_ANY, FOUR_TO_SIX, SIX, SIX_DECREMENTED, SIX_TO_FOUR = range(9)
OF_IPV6 = (FOUR_TO_SIX, SIX, SIX_DECREMENTED)
TOLD_TTL = (DECREMENTED, SIX_DECREMENTED)
BEFORE_MATCH = (
    DropCause.TRUNCATED,
    DropCause.PARSE_ERROR,
    DropCause.FRAGMENT,
    DropCause.CHECKSUM,
    DropCause.NO_MATCH,
    DropCause.OWN_EGRESS,
)


Address = tuple[int, int, int]  # version and both numbers of a VERDICT


def judged_address(address: str) -> Address:
    """An address as the oracle tells it."""
    if ":" in address:
        return (6, *struct.unpack(">qq", socket.inet_pton(socket.AF_INET6, address)))
    return 4, int.from_bytes(socket.inet_aton(address), "big"), 0


GROUPS, GROUPS6 = (tuple(map(judged_address, groups)) for groups in (frames.GROUPS, frames.GROUPS6))
ASKED_SOURCE, OWN_ADDRESS = map(judged_address, frames.SOURCES[1:])
ASKED_SOURCE6, OWN_ADDRESS6 = map(judged_address, frames.SOURCES6[1:])


class WrongError(Exception):
    """The relay did something else than it should."""


@compiled
def make_all(
    made: Any, metas: Any, sound: Any, lengths: Any, special: Any, ethertypes: Any, gso: Any, state: Any
) -> None:
    """Fill `made` (u1[n, …]) with frames and `metas` (META[n]) with what the kernel says of them."""
    for i in range(len(metas)):
        frames.make(made[i], metas[i], sound, lengths, special, ethertypes, gso, state)


@compiled
def judge_all(made: Any, metas: Any, came: Any, verdicts: Any) -> None:
    """Fill `verdicts`. `came`: u1[n], whether the copy of a frame that fits no slot is in the queue."""
    for i in range(len(metas)):
        meta, verdict = metas[i], verdicts[i]
        verdict.datagrams = 1
        verdict.payload_bytes = 0
        if (meta.status & frames.TP_STATUS_COPY != 0 and not came[i]) or (
            meta.status & frames.TP_STATUS_COPY == 0 and meta.length < meta.tp_len
        ):
            verdict.cause = oracle.TRUNCATED
        elif meta.pkttype == 3:  # PACKET_OTHERHOST
            verdict.cause = oracle.NO_MATCH
        else:
            trusted = meta.status & (frames.TP_STATUS_CSUM_VALID | frames.TP_STATUS_CSUMNOTREADY) != 0
            verdict.cause = oracle.judge(made[i], meta.length, meta.gso_type, meta.gso_size, trusted, verdict)


@compiled
def fill(base: int, stride: int, first: int, slots: int, made: Any, metas: Any, snaplens: Any, macs: Any) -> None:
    """Hand frames over as tpacket_rcv does: the status last."""
    for i in range(len(metas)):
        meta = metas[i]
        slot = base + (first + i) % slots * stride
        frame = slot + macs[i]
        for at in range(snaplens[i]):
            store_u8(frame + at, made[i, at])
        store_u32(slot + 4, meta.tp_len)
        store_u32(slot + 8, snaplens[i])
        store_u16(slot + 12, macs[i])
        store_u16(slot + 14, min(macs[i] + 14, 0xFFFF))
        store_u8(slot + 32 + 10, meta.pkttype)  # sll_pkttype, behind tpacket2_hdr
        store_u8(frame - 10 + 1, meta.gso_type)
        store_u16(frame - 10 + 4, meta.gso_size)
        store_release_u32(slot, meta.status)


class DataPath:
    """One worker's data path without its process, and the receivers of what it sends."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.uring = Uring(memory.SQ_ENTRIES)
        log = np.zeros(LOG_BYTES, np.uint8)
        stats = np.zeros(layout.STATS_BYTES, np.uint8)
        self.memory = memory.Memory(
            self.uring.sqes, self.uring.cqes, stats, np.zeros(copies.COPIES_BYTES, np.uint8), (log, log, log, log)
        )
        self.uring.attach(self.memory.worker)
        self.memory.worker["now_ns"] = 1
        self.memory.worker["stream_health"] = streams.FULL
        self.receivers = [self._receiver(number in OF_IPV6) for number in range(9)]
        self.receivers[DECREMENTED].setsockopt(socket.IPPROTO_IP, IP_RECVTTL, 1)
        self.receivers[SIX_DECREMENTED].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVHOPLIMIT, 1)
        self.egress = [socket.socket(family, socket.SOCK_DGRAM) for family in (socket.AF_INET, socket.AF_INET6)]
        self.memory["egress_fds"]["value"][:2] = [sock.fileno() for sock in self.egress]
        self.table = view_table(compile_table(self._rules(), self._own(), 1))
        self.slots = Guarded(SLOTS, 1)
        self.arena = Guarded(copies.COPY_SLOTS, 18)
        self.default_bases = self.memory["copy_iovecs"]["iov_base"].copy()
        self.kernel, queue = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.queue = queue
        self.kernel.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 64 << 20)
        self.ring = self.memory["rings"][0]
        values = {"fd": queue.fileno(), "base": self.slots.base, "frame_bytes": self.slots.stride, "frames": SLOTS}
        for name, value in values.items():
            self.ring[name] = value
        self.ring["active"] = 1
        self.memory.link_copies(0)
        self.sound = frames.as_array(frames.sound_frames(), frames.FRAME_BYTES_MAX)
        self.big = frames.as_array(frames.big_frames(), frames.BIG_BYTES_MAX)
        self.made = np.zeros((FRAMES_OF_PASS, frames.FRAME_BYTES_MAX), np.uint8)
        self.made_big = np.zeros((BIG_MAX, frames.BIG_BYTES_MAX), np.uint8)
        self.state = np.zeros(1, np.int64)
        self.relayed = 0
        self.drops = np.zeros(layout.DROP_CAUSES, np.int64)

    @staticmethod
    def _receiver(is_of_ipv6: bool) -> socket.socket:
        sock = socket.socket(socket.AF_INET6 if is_of_ipv6 else socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
        sock.bind((LOOPBACK6 if is_of_ipv6 else LOOPBACK, 0))
        sock.setblocking(False)
        return sock

    def _output(self, number: int) -> TableOutput:
        port = self.receivers[number].getsockname()[1]
        decrement = number in TOLD_TTL
        if number in OF_IPV6:
            return TableOutput(number, LOOPBACK6, port, 1, 65_488, False, decrement)
        return TableOutput(number, LOOPBACK, port, 0, 65_508, False, decrement)

    def _rules(self) -> list[TableRule]:
        outputs = [self._output(number) for number in range(len(self.receivers))]
        groups, groups6, asked, asked6 = frames.GROUPS, frames.GROUPS6, frames.SOURCES[1], frames.SOURCES6[1]
        varied, six = (VARIED, DECREMENTED, FOUR_TO_SIX), (SIX, SIX_DECREMENTED)
        return [
            TableRule(0, "plain", groups[0], 5001, None, (0,), False, (outputs[PLAIN],)),
            TableRule(1, "ttl", groups[1], 5001, None, (0,), False, tuple(outputs[number] for number in varied)),
            TableRule(2, "source", groups[2], 5002, asked, (0,), False, (outputs[FROM_SOURCE],)),
            TableRule(3, "any", groups[2], 5002, None, (0,), False, (outputs[FROM_ANY],)),
            TableRule(4, "elsewhere", groups[3], 5001, None, (1,), False, (outputs[PLAIN],)),
            TableRule(5, "six", groups6[0], 5001, None, (0,), False, tuple(outputs[number] for number in six)),
            TableRule(6, "crossing", groups6[1], 5001, asked6, (0,), False, (outputs[SIX_TO_FOUR],)),
        ]

    @staticmethod
    def _own() -> list[OwnSource]:
        return [
            OwnSource(frames.SOURCES[2], frames.OWN_PORT, "239.9.9.9", 9),
            OwnSource(frames.SOURCES6[2], frames.OWN_PORT, "ff3e::9", 9),
            OwnSource(None, frames.OWN_PRESERVING_PORT, frames.GROUPS[0], 5001),
            OwnSource(None, frames.OWN_PRESERVING_PORT, frames.GROUPS6[0], 5001),
        ]

    # --- one pass -----------------------------------------------------------------------------------

    def make(self, number: int) -> tuple[Any, Any, Any]:
        """The frames of a pass, what the kernel says of them, and which copies come."""
        self.state[0] = (self.seed * 1_000_003 + number) * 0x9E3779B97F4A7C1 % (1 << 62)
        for _ in range(4):
            frames.dice(self.state, 2)
        is_big = number % BIG_EVERY == BIG_EVERY - 1
        sound, lengths = self.big if is_big else self.sound
        made = self.made_big if is_big else self.made
        count = 1 + frames.dice(self.state, BIG_MAX) if is_big else FRAMES_OF_PASS
        metas = np.zeros(count, frames.META)
        make_all(made[:count], metas, sound, lengths, frames.SPECIAL, frames.ETHERTYPES, frames.GSO_TYPES, self.state)
        came = np.zeros(count, np.uint8)
        if is_big:
            metas["status"] |= frames.TP_STATUS_COPY
            metas["tp_len"] = metas["length"]
            for i in range(count):
                # Two that are the same can't be told apart; the parser reads no source address.
                made[i, 6:12] = np.frombuffer(struct.pack("<IH", number & 0xFFFFFFFF, i), np.uint8)
                came[i] = frames.dice(self.state, 8) != 0
        return made[:count], metas, came

    def put(self, made: Any, metas: Any, came: Any) -> None:
        """Fill the ring, and the queue of copies."""
        is_copied = came.any()
        snaplens = np.minimum(metas["length"], BIG_SNAPLEN if is_copied else frames.FRAME_BYTES_MAX)
        macs = PAGE - snaplens
        self.memory["copy_iovecs"]["iov_base"] = self.default_bases
        fetched = [i for i in range(len(metas)) if came[i]]
        for place, i in enumerate(fetched):
            meta = metas[i]
            header = struct.pack("<BBHHHH", 0, meta["gso_type"], 0, meta["gso_size"], 0, 0)
            copy = header + made[i, : meta["length"]].tobytes()
            self.kernel.send(copy)
            if len(fetched) <= copies.COPY_SLOTS:
                held = min(len(copy), copies.COPY_SLOT_BYTES)
                self.memory["copy_iovecs"]["iov_base"][place] = self.arena.end(place) - held
        fill(self.slots.base, self.slots.stride, int(self.ring["cursor"]), SLOTS, made, metas, snaplens, macs)

    def expect(self, made: Any, verdicts: Any) -> tuple[Any, list[list[Any]]]:
        """Drops by cause, and what each receiver gets; with its TTL where that is told."""
        drops = np.zeros(layout.DROP_CAUSES, np.int64)
        sent: list[list[Any]] = [[] for _ in self.receivers]
        for i, verdict in enumerate(verdicts.tolist()):
            cause, datagrams, payload, size, segment, ttl, version, *ends = verdict
            source, sport, destination, dport = (version, *ends[:2]), ends[2], (version, *ends[3:5]), ends[5]
            receivers: Sequence[int] = ()
            if cause == oracle.NONE:
                receivers = self._receivers_of(destination, dport, source)
                if not receivers:
                    cause = oracle.NO_MATCH
                elif (source in (OWN_ADDRESS, OWN_ADDRESS6) and sport == frames.OWN_PORT) or (
                    sport == frames.OWN_PRESERVING_PORT
                    and (destination, dport) in ((GROUPS[0], 5001), (GROUPS6[0], 5001))
                ):
                    cause = oracle.OWN_EGRESS
            if cause != oracle.NONE:
                drops[CAUSES[cause]] += datagrams
                continue
            whole = made[i, payload : payload + size].tobytes()
            parts = [whole[at : at + segment] for at in range(0, size, segment)] if size else [b""]
            for receiver in receivers:
                if receiver not in TOLD_TTL:
                    sent[receiver] += parts
                elif ttl > 1:
                    sent[receiver] += [(part, ttl - 1) for part in parts]
                else:
                    drops[DropCause.TTL] += len(parts)
        return drops, sent

    @staticmethod
    def _receivers_of(destination: Address, port: int, source: Address) -> Sequence[int]:
        if (destination, port) == (GROUPS[0], 5001):
            return (PLAIN,)
        if (destination, port) == (GROUPS[1], 5001):
            return (VARIED, DECREMENTED, FOUR_TO_SIX)
        if (destination, port) == (GROUPS[2], 5002):
            return (FROM_SOURCE, FROM_ANY) if source == ASKED_SOURCE else (FROM_ANY,)
        if (destination, port) == (GROUPS6[0], 5001):
            return (SIX, SIX_DECREMENTED)
        if (destination, port) == (GROUPS6[1], 5001) and source == ASKED_SOURCE6:
            return (SIX_TO_FOUR,)
        return ()

    def received(self, number: int) -> list[Any]:
        """What a receiver got. Loopback delivers before a send completes."""
        sock = self.receivers[number]
        got: list[Any] = []
        try:
            if number in TOLD_TTL:
                while True:
                    payload, control, _, _ = sock.recvmsg(65_536, 64)
                    got.append((payload, struct.unpack("<i", control[0][2])[0]))
            while True:
                got.append(sock.recv(65_536))
        except BlockingIOError:
            return got

    def check(self, number: int, made: Any, metas: Any, came: Any) -> None:
        """Relay frames and compare. Raises WrongError."""
        verdicts = np.zeros(len(metas), oracle.VERDICT)
        judge_all(made, metas, came & (metas["length"] <= copies.COPY_SLOT_BYTES - TRAILER_BYTES), verdicts)
        drops, sent = self.expect(made, verdicts)
        stats = self.memory["stats"][0]
        before = {name: int(stats[name]) for name in ("packets_in", "packets_matched", "bytes_in", "packets_relayed")}
        self.put(made, metas, came)
        self.memory["streams"]["kind"] = number % 4  # each is taken for everything that it could be
        self.memory["streams"]["sync_run"] = mpegts.IN_SYNC
        taken = run_pass(self.memory.worker, self.table.view)
        self.drops += drops
        got = [self.received(receiver) for receiver in range(len(self.receivers))]
        self.relayed += sum(map(len, got))
        increase = {name: int(stats[name]) - value for name, value in before.items()}
        early = int(sum(drops[cause] for cause in BEFORE_MATCH))
        wanted = {
            "packets_in": int(verdicts["datagrams"].sum()),
            "packets_matched": int(verdicts["datagrams"].sum()) - early,
            "bytes_in": int(verdicts["payload_bytes"][verdicts["cause"] == oracle.NONE].sum()),
            "packets_relayed": sum(map(len, sent)),
        }
        wrong = []
        if taken != len(metas):
            wrong.append(f"{taken} of {len(metas)} frames taken")
        if increase != wanted:
            wrong.append(f"counters grew by {increase}, not {wanted}")
        if (stats["drops"] != self.drops).any():
            wrong.append(f"drops {(stats['drops'] - self.drops + drops).tolist()}, not {drops.tolist()}")
        seen = self.memory["streams"]["packets"].sum()
        if seen != stats["packets_matched"] and not self.memory["health"][0]["frames_untracked"]:
            wrong.append(f"streams have {seen} datagrams of {stats['packets_matched']}")
        for receiver, (ours, theirs) in enumerate(zip(sent, got, strict=True)):
            if receiver == FROM_ANY:  # what two entries send has no order among them
                ours, theirs = sorted(ours), sorted(theirs)  # noqa: PLW2901
            if ours != theirs:
                wrong.append(f"receiver {receiver} got {len(theirs)} datagrams, not {len(ours)}, or others")
        if self.ring["copy_next"] != self.ring["copy_count"]:
            wrong.append(f"{self.ring['copy_count'] - self.ring['copy_next']} copies left over")
        if wrong:
            raise WrongError(f"seed {self.seed}, pass {number}: {'; '.join(wrong)}")

    def settle(self) -> None:
        """Forget what a wrong pass left."""
        drain(self.memory.worker, self.table.view)
        for receiver in range(len(self.receivers)):
            self.received(receiver)
        self.drops[:] = self.memory["stats"][0]["drops"]
        self.ring["copy_next"] = self.ring["copy_count"] = 0

    def close(self) -> None:
        """Close every socket and the ring."""
        for sock in (*self.egress, self.kernel, self.queue, *self.receivers):
            sock.close()
        self.uring.close()


CAUSES = {
    oracle.TRUNCATED: DropCause.TRUNCATED,
    oracle.PARSE_ERROR: DropCause.PARSE_ERROR,
    oracle.FRAGMENT: DropCause.FRAGMENT,
    oracle.CHECKSUM: DropCause.CHECKSUM,
    oracle.NO_MATCH: DropCause.NO_MATCH,
    oracle.OWN_EGRESS: DropCause.OWN_EGRESS,
}


def describe(number: int, index: int, frame: bytes, meta: Any) -> str:
    """A frame so that it can be made again."""
    told = ", ".join(f"{name} {int(meta[name])}" for name in frames.META.names or ())
    return f"frame {index} of pass {number} ({told}) begins {frame[:256].hex()}"


def overrun(path: DataPath) -> None:
    """Have the ring claim what the kernel never would: more bytes than there are. It must kill this process."""
    made, metas, came = path.make(0)
    made[0] = 0
    frame = bytes(frames.ETHERNET / frames.datagram(bytes(1000)))
    made[0, : len(frame)] = np.frombuffer(frame, np.uint8)
    metas[0]["length"] = metas[0]["tp_len"] = len(frame) - 200
    metas[0]["status"], metas[0]["gso_type"], metas[0]["pkttype"] = frames.TP_STATUS_USER, 0, 2
    path.put(made[:1], metas[:1], came[:1])
    slot = path.slots.address(int(path.ring["cursor"]))
    store_release_u32_at(slot + 4, len(frame))
    store_release_u32_at(slot + 8, len(frame))
    run_pass(path.memory.worker, path.table.view)


@compiled
def store_release_u32_at(address: int, value: int) -> None:
    """For the interpreter."""
    store_release_u32(address, value)


def one_by_one(path: DataPath, number: int, progress: Progress) -> None:
    """Relay a pass's frames each in a pass of its own, told before it is tried."""
    made, metas, came = path.make(number)
    made, metas, came = made.copy(), metas.copy(), came.copy()
    for i in range(len(metas)):
        frame = made[i, : metas[i]["length"]].tobytes()
        progress.tell(number * FRAMES_OF_PASS + i, describe(number, i, frame, metas[i]))
        try:
            path.check(number, made[i : i + 1], metas[i : i + 1], came[i : i + 1])
        except WrongError as error:
            raise WrongError(f"{error}; {progress.what}") from None


def run(path: DataPath, count: int, seconds: float, progress: Progress) -> int:
    """Relay at least `count` frames, or for some seconds; return how many. Raises WrongError."""
    done = number = 0
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s if seconds else done < count:
        progress.tell(number)
        made, metas, came = path.make(number)
        try:
            path.check(number, made, metas, came)
        except WrongError as error:
            path.settle()
            one_by_one(path, number, progress)
            raise error
        done += len(metas)
        number += 1
    return done


def main() -> int:
    """As the module says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--frames", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--progress", type=Path, required=True)
    parser.add_argument("--only-pass", type=int)
    parser.add_argument("--overrun", action="store_true")
    options = parser.parse_args()
    progress = Progress(options.progress)
    path = DataPath(options.seed)
    started_s = time.monotonic()
    try:
        if options.overrun:
            overrun(path)
        elif options.only_pass is not None:
            one_by_one(path, options.only_pass, progress)
        else:
            done = run(path, options.frames, options.seconds, progress)
            seconds = time.monotonic() - started_s
            drops = {cause.name.lower(): int(path.drops[cause]) for cause in DropCause if path.drops[cause]}
            print(f"{done} frames in {seconds:.1f} s, {path.relayed} datagrams received, dropped {drops}")
    except WrongError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        path.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
