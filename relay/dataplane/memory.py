"""A worker's memory: everything that the compiled loop uses, allocated once, before traffic.

Owned by one worker process. Compiled functions take `m`, a WORKER record: the loop's own state, and the addresses of
all else. The arrays behind those addresses live as long as the Memory.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from relay.dataplane import layout, uring_params
from relay.dataplane.copies import ARENA_OFFSET, COPIES_HEADER, COPY_SLOT_BYTES, COPY_SLOTS
from relay.dataplane.counters import sections_of
from relay.dataplane.layout import UDP_SEGMENTS_MAX
from relay.dataplane.records import record_at

# Frames taken from one ring before it goes round: bounds latency of the others to a millisecond. Only a backlog is that
# large; then 256 interleaved streams leave 16 datagrams at a time, 4 with a quarter of it.
PASS_FRAMES_MAX = 4096
BATCHES_MAX = 1024
SQ_ENTRIES = uring_params.SQ_ENTRIES
NO_STREAM = -1  # there was no room for its record
STREAM_UNSOUGHT = -2
TABLE_ENTRIES_MAX = 65_536
STREAM_INDEX_SLOTS = 4 * layout.STREAMS_MAX
PENDING_MAX = layout.RINGS_MAX * PASS_FRAMES_MAX  # a pass drains at its end at the latest
FLOWS = 1024  # of the flow cache, a power of two; 32 KiB

# What match and is_own_source said of a flow, for the datagrams that follow: one probe instead of two or three.
FLOW = np.dtype(
    [
        ("src", "<u4"),
        ("dst", "<u4"),
        ("ports", "<u4"),  # source << 16 | destination
        ("ring", "<u2"),
        ("cause", "<u2"),  # DropCause
        ("generation", "<i8"),  # of the table that said it, plus 1; 0: empty
        ("entry", "<i4"),
        ("stream", "<i4"),  # number of its record, NO_STREAM or STREAM_UNSOUGHT
    ]
)

RING = np.dtype(
    [
        ("active", "<i8"),
        ("fd", "<i8"),
        ("base", "<i8"),
        ("frame_bytes", "<i8"),
        ("frames", "<i8"),
        ("cursor", "<i8"),
        ("taken", "<i8"),  # frames of this pass, not yet returned to the kernel
        ("copy_next", "<i8"),
        ("copy_count", "<i8"),
        ("fill_level", "<i8"),  # the highest of FILL_LEVELS_PERCENT that was reported
        ("fill_due", "<i8"),  # how full it is is to be published
    ]
)

POLLFD = np.dtype([("fd", "<i4"), ("events", "<i2"), ("revents", "<i2")])
PENDING = np.dtype([("received_ns", "<i8"), ("datagrams", "<i8")])
RETRY = np.dtype([("output", "<i4"), ("batch", "<i4")])
OPEN_BATCH = np.dtype([("window", "<i8"), ("batch", "<i8")])
I64 = np.dtype([("value", "<i8")])
I32 = np.dtype([("value", "<i4")])
U8 = np.dtype([("value", "u1")])

# What lies behind each address of WORKER: field, layout of an element, and how many; None for what is mapped.
ARRAYS: tuple[tuple[str, Any, int | None], ...] = (
    ("rings", RING, layout.RINGS_MAX),
    ("sqes", layout.IO_URING_SQE, None),  # the kernel's, SQ_ENTRIES
    ("cqes", layout.IO_URING_CQE, None),  # the kernel's, twice as many
    ("slots", layout.SEND_SLOT, SQ_ENTRIES),
    ("batches", layout.BATCH, BATCHES_MAX),
    ("iovecs", layout.IOVEC, BATCHES_MAX * UDP_SEGMENTS_MAX),
    ("retries", RETRY, SQ_ENTRIES),
    ("open_batches", OPEN_BATCH, TABLE_ENTRIES_MAX),  # by entry
    ("flows", FLOW, FLOWS),
    ("copy_mmsg", layout.MMSGHDR, None),  # shared with the successor: the copy arena
    ("copy_places", I64, None),
    ("copy_arena", U8, None),
    ("copy_iovecs", layout.IOVEC, layout.RINGS_MAX * COPY_SLOTS),
    ("pollfds", POLLFD, 1 + layout.RINGS_MAX),
    ("egress_fds", I32, layout.OUTPUTS_MAX),  # by socket number
    ("gso_states", U8, layout.OUTPUTS_MAX),  # by socket number
    ("reported", I64, layout.DROP_CAUSES),  # drops already told to the log
    ("stats", layout.STATS_HEADER, None),  # shared: the stats segment
    ("rule_stats", layout.RULE_STATS, None),
    ("output_stats", layout.OUTPUT_STATS, None),
    ("health", layout.HEALTH, None),
    ("streams", layout.STREAM, None),
    ("pids", layout.PID, None),  # PIDS_MAX a stream
    ("guard_cells", layout.GUARD_CELL, None),  # shared by all workers; handed over before the first table
    ("protections", layout.PROTECTION, None),
    ("journal", layout.JOURNAL, None),
    ("merging", I32, layout.PROTECTIONS_MAX),  # the entry that a protected rule's last batch is of
    ("stream_index", I32, STREAM_INDEX_SLOTS),  # from a hash to a stream's number
    ("pending", PENDING, PENDING_MAX),  # frames matched since the last drain
    ("log_dataplane", U8, None),  # shared: the log segments
    ("log_ingress", U8, None),
    ("log_egress", U8, None),
    ("log_bufferpool", U8, None),
)

WORKER = np.dtype(
    [
        # io_uring
        ("uring_fd", "<i8"),
        ("sq_tail_ptr", "<i8"),
        ("sq_mask", "<i8"),
        ("sq_tail", "<i8"),
        ("cq_head_ptr", "<i8"),
        ("cq_tail_ptr", "<i8"),
        ("cq_mask", "<i8"),
        ("queued", "<i8"),  # SQEs filled and not yet submitted
        ("retry_count", "<i8"),
        # coalescing
        ("batch_count", "<i8"),
        ("window", "<i8"),  # numbers the spans between two drains; an open batch is valid for one
        # waiting
        ("control_fd", "<i8"),
        ("doorbell_seen", "<i8"),
        ("now_ns", "<i8"),
        ("timer_ns", "<i8"),
        ("report_ns", "<i8"),
        ("idle_mode", "<i8"),
        ("spin_ns", "<i8"),
        ("nap_ns", "<i8"),
        ("gap_ns", "<i8"),  # mean distance of datagrams lately
        ("gap_since_ns", "<i8"),
        ("gap_packets", "<i8"),
        ("draining", "<i8"),
        ("trace", "<i8"),
        # health of streams
        ("stream_health", "<i8"),  # one of streams.OFF, ONLY_RTP, FULL
        ("cells_at", "<i8"),  # where in a slot transport stream packets began lately; 0: nowhere
        ("pending_count", "<i8"),
        ("evict_next", "<i8"),  # where to look for a stream that has ended
        # protection
        ("rings_since_ns", "<i8"),  # since when all rings are read
        ("timespec", "<i8", (2,)),
        ("datagram", layout.DATAGRAM),
        *((name, "<i8") for name, _, _ in ARRAYS),
    ]
)

ring_at = record_at(RING)
sqe_at = record_at(layout.IO_URING_SQE)
cqe_at = record_at(layout.IO_URING_CQE)
slot_at = record_at(layout.SEND_SLOT)
batch_at = record_at(layout.BATCH)
iovec_at = record_at(layout.IOVEC)
retry_at = record_at(RETRY)
open_batch_at = record_at(OPEN_BATCH)
flow_at = record_at(FLOW)
mmsg_at = record_at(layout.MMSGHDR)
pollfd_at = record_at(POLLFD)
i64_at = record_at(I64)
i32_at = record_at(I32)
u8_at = record_at(U8)
stats_at = record_at(layout.STATS_HEADER)
rule_stats_at = record_at(layout.RULE_STATS)
output_stats_at = record_at(layout.OUTPUT_STATS)
health_at = record_at(layout.HEALTH)
stream_at = record_at(layout.STREAM)
pid_at = record_at(layout.PID)
pending_at = record_at(PENDING)
TIMESPEC_OFFSET = layout.offset_of(WORKER, "timespec")


def _timespec_of(typing_context: Any, worker: Any) -> Any:
    """The address of a WORKER record's timespec, for system calls."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.add(builder.ptrtoint(args[0], ir.IntType(64)), ir.IntType(64)(TIMESPEC_OFFSET))

    return types.int64(worker), generate


timespec_of: Any = intrinsic(_timespec_of)


def address_of(array: Any) -> int:
    """The address of an array's first byte."""
    return int(array.ctypes.data)


class Memory:
    """The arrays of a worker by their names in ARRAYS, and `worker`, the WORKER record that compiled code takes."""

    def __init__(self, sqes: Any, cqes: Any, stats: Any, copies: Any, logs: tuple[Any, Any, Any, Any]) -> None:
        """Allocate and link what does not depend on rings or rules.

        `stats` is the mapped u1 array of the stats segment, `copies` of the copy arena; `logs` the mapped DataPlane,
        Ingress, Egress and BufferPool segments.
        """
        fetched = copies[: COPIES_HEADER.itemsize].view(COPIES_HEADER)[0]
        self.arrays: dict[str, Any] = {name: np.zeros(count, dtype) for name, dtype, count in ARRAYS if count}
        self.arrays |= {
            "sqes": sqes,
            "cqes": cqes,
            "copy_mmsg": fetched["mmsg"].reshape(-1),
            "copy_places": fetched["places"].reshape(-1).view(I64),
            "copy_arena": copies[ARENA_OFFSET:],
            **sections_of(stats),
        }
        self.arrays |= dict(zip(("log_dataplane", "log_ingress", "log_egress", "log_bufferpool"), logs, strict=True))
        self._record = np.zeros(1, WORKER)
        self.worker: Any = self._record[0]
        for name, array in self.arrays.items():
            self.worker[name] = address_of(array)
        self.worker["window"] = 1
        self.arrays["egress_fds"]["value"] = -1
        self._link_sends()
        index = np.arange(layout.RINGS_MAX * COPY_SLOTS, dtype=np.int64)
        self.arrays["copy_iovecs"]["iov_base"] = address_of(self.arrays["copy_arena"]) + index * COPY_SLOT_BYTES
        self.arrays["copy_iovecs"]["iov_len"] = COPY_SLOT_BYTES

    def __getitem__(self, name: str) -> Any:
        """An array by its name in ARRAYS."""
        return self.arrays[name]

    def _link_sends(self) -> None:
        """Fill what is the same in every send: only this worker writes SQEs, and the kernel never does."""
        slots, sqes = self.arrays["slots"], self.arrays["sqes"]
        index = np.arange(SQ_ENTRIES)
        slots["name"]["sin_family"] = layout.AF_INET
        slots["msg"]["msg_iovlen"] = 1
        sqes["opcode"] = layout.IORING_OP_SENDMSG
        sqes["addr"] = address_of(slots) + index * layout.SEND_SLOT.itemsize
        sqes["len"] = 1
        sqes["msg_flags"] = layout.MSG_DONTWAIT | layout.MSG_NOSIGNAL
        sqes["user_data"] = index

    def use_guard_cells(self, cells: Any) -> None:
        """Use these buckets, GUARD_CELL[RULES_MAX], for guarded rules."""
        self.arrays["guard_cells"] = cells
        self.worker["guard_cells"] = address_of(cells)

    def link_copies(self, ring_index: int) -> None:
        """Have frames of this ring fetched here. Its former reader, which shares the arena, must have ended."""
        index = np.arange(ring_index * COPY_SLOTS, (ring_index + 1) * COPY_SLOTS, dtype=np.int64)
        header = self.arrays["copy_mmsg"]["msg_hdr"][index[0] : index[-1] + 1]
        header["msg_iov"] = address_of(self.arrays["copy_iovecs"]) + index * layout.IOVEC.itemsize
        header["msg_iovlen"] = 1
