"""The worker's memory: every array that the compiled loop uses, allocated once, before traffic.

Owned by one worker process; nothing here is shared. Compiled functions take a `Memory` (arrays that
live as long as the worker) and a `Table` (views of the current rule table).
"""

from typing import Any, NamedTuple

import numpy as np

from relay.dataplane import layout
from relay.dataplane.layout import UDP_SEGMENTS_MAX

PASS_FRAMES_MAX = 1024  # frames taken from one ring before it goes round: bounds latency of the others
BATCHES_MAX = 1024
SQ_ENTRIES = 1024
COPY_SLOTS = 16  # super-frames fetched by one recvmmsg; 16 x 68 KiB stays within a usual L2 cache
COPY_SLOT_BYTES = 69_632  # virtio header, Ethernet with two tags, 65 535 bytes of IP; a multiple of 4096
TABLE_ENTRIES_MAX = 65_536

STATE = np.dtype(
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
        ("retries", "<i8"),
        # coalescing
        ("batches", "<i8"),
        ("window", "<i8"),  # numbers the spans between two drains; open_batch is valid for one
        # waiting
        ("control_fd", "<i8"),
        ("doorbell_seen", "<i8"),
        ("now_ns", "<i8"),
        ("timer_ns", "<i8"),
        ("report_ns", "<i8"),
        ("idle_mode", "<i8"),
        ("spin_ns", "<i8"),
        ("nap_ns", "<i8"),
        ("draining", "<i8"),
        ("trace", "<i8"),
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
    ]
)

POLLFD = np.dtype([("fd", "<i4"), ("events", "<i2"), ("revents", "<i2")])


class Memory(NamedTuple):
    """Arrays of one worker, by role. Fields typed Any are NumPy arrays of the dtype named."""

    state: Any  # STATE[1]
    rings: Any  # RING[RINGS_MAX]
    sqes: Any  # IO_URING_SQE[SQ_ENTRIES], the kernel's
    cqes: Any  # IO_URING_CQE[2 * SQ_ENTRIES], the kernel's
    slots: Any  # SEND_SLOT[SQ_ENTRIES]
    batches: Any  # BATCH[BATCHES_MAX]
    iovecs: Any  # IOVEC[BATCHES_MAX, UDP_SEGMENTS_MAX]
    retry: Any  # i4[SQ_ENTRIES, 2]: output, batch
    open_batch: Any  # i8[TABLE_ENTRIES_MAX, 2]: window, batch
    datagram: Any  # DATAGRAM[1]
    copy_mmsg: Any  # MMSGHDR[RINGS_MAX, COPY_SLOTS]
    copy_iovecs: Any  # IOVEC[RINGS_MAX, COPY_SLOTS]
    copy_arena: Any  # u1[RINGS_MAX, COPY_SLOTS, COPY_SLOT_BYTES]
    pollfds: Any  # POLLFD[1 + RINGS_MAX]
    timespec: Any  # i8[2]
    egress_fds: Any  # i4[OUTPUTS_MAX], by socket number
    gso_state: Any  # i1[OUTPUTS_MAX], by socket number
    stats: Any  # STATS_HEADER[1], shared
    rule_stats: Any  # RULE_STATS[RULES_MAX], shared
    output_stats: Any  # OUTPUT_STATS[OUTPUTS_MAX], shared
    reported: Any  # i8[DROP_CAUSES]: drops already told to the log
    log_dataplane: Any  # u1[…], the mapped log segments
    log_ingress: Any
    log_egress: Any
    log_bufferpool: Any


class Table(NamedTuple):
    """Views of the current rule table."""

    keys: Any  # KEY[2^n]
    entries: Any  # ENTRY
    routes: Any  # ROUTE
    route_outputs: Any  # u4: indices into outputs
    outputs: Any  # OUTPUT
    own: Any  # OWN_SOURCE[2^n]
    rule_names: Any  # RULE_NAME


def address_of(array: Any) -> int:
    """The address of an array's first byte."""
    return int(array.ctypes.data)


def allocate(sqes: Any, cqes: Any, stats: Any, logs: tuple[Any, Any, Any, Any]) -> Memory:
    """Allocate and link what does not depend on rings or rules.

    `stats` is the mapped u1 array of the stats segment; `logs` the mapped DataPlane, Ingress, Egress
    and BufferPool segments.
    """
    rule_end = layout.STATS_RULES_OFFSET + layout.RULES_MAX * layout.RULE_STATS.itemsize
    memory = Memory(
        state=np.zeros(1, STATE),
        rings=np.zeros(layout.RINGS_MAX, RING),
        sqes=sqes,
        cqes=cqes,
        slots=np.zeros(SQ_ENTRIES, layout.SEND_SLOT),
        batches=np.zeros(BATCHES_MAX, layout.BATCH),
        iovecs=np.zeros((BATCHES_MAX, UDP_SEGMENTS_MAX), layout.IOVEC),
        retry=np.zeros((SQ_ENTRIES, 2), np.int32),
        open_batch=np.zeros((TABLE_ENTRIES_MAX, 2), np.int64),
        datagram=np.zeros(1, layout.DATAGRAM),
        copy_mmsg=np.zeros((layout.RINGS_MAX, COPY_SLOTS), layout.MMSGHDR),
        copy_iovecs=np.zeros((layout.RINGS_MAX, COPY_SLOTS), layout.IOVEC),
        copy_arena=np.zeros((layout.RINGS_MAX, COPY_SLOTS, COPY_SLOT_BYTES), np.uint8),
        pollfds=np.zeros(1 + layout.RINGS_MAX, POLLFD),
        timespec=np.zeros(2, np.int64),
        egress_fds=np.full(layout.OUTPUTS_MAX, -1, np.int32),
        gso_state=np.zeros(layout.OUTPUTS_MAX, np.int8),
        stats=stats[: layout.STATS_HEADER.itemsize].view(layout.STATS_HEADER),
        rule_stats=stats[layout.STATS_RULES_OFFSET : rule_end].view(layout.RULE_STATS),
        output_stats=stats[layout.STATS_OUTPUTS_OFFSET : layout.STATS_BYTES].view(layout.OUTPUT_STATS),
        reported=np.zeros(layout.DROP_CAUSES, np.int64),
        log_dataplane=logs[0],
        log_ingress=logs[1],
        log_egress=logs[2],
        log_bufferpool=logs[3],
    )
    memory.state[0]["window"] = 1
    _link_send_slots(memory)
    _link_copy_slots(memory)
    return memory


def _link_send_slots(memory: Memory) -> None:
    base = address_of(memory.slots)
    slot_bytes = layout.SEND_SLOT.itemsize
    addresses = base + np.arange(SQ_ENTRIES, dtype=np.int64) * slot_bytes
    message = memory.slots["msg"]
    message["msg_iov"] = addresses + layout.offset_of(layout.SEND_SLOT, "iov")
    message["msg_iovlen"] = 1
    message["msg_control"] = addresses + layout.offset_of(layout.SEND_SLOT, "control")
    memory.slots["name"]["sin_family"] = 2  # AF_INET


def _link_copy_slots(memory: Memory) -> None:
    arena = address_of(memory.copy_arena)
    index = np.arange(layout.RINGS_MAX * COPY_SLOTS, dtype=np.int64).reshape(layout.RINGS_MAX, COPY_SLOTS)
    memory.copy_iovecs["iov_base"] = arena + index * COPY_SLOT_BYTES
    memory.copy_iovecs["iov_len"] = COPY_SLOT_BYTES
    header = memory.copy_mmsg["msg_hdr"]
    header["msg_iov"] = address_of(memory.copy_iovecs) + index * layout.IOVEC.itemsize
    header["msg_iovlen"] = 1
