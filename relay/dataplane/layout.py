"""Memory layouts of the data path, each defined once, as data.

Kernel structures (packet ring, virtio header, io_uring, sendmsg) are read and written through
these dtypes and offsets; the tests compare them with the C ABI. The rest is the relay's own.
"""

from enum import IntEnum, IntFlag
from typing import Any, Final

import numpy as np

# linux/if_packet.h
TP_STATUS_KERNEL: Final = 0
TP_STATUS_USER: Final = 1 << 0
TP_STATUS_COPY: Final = 1 << 1
TP_STATUS_CSUMNOTREADY: Final = 1 << 3
TP_STATUS_VLAN_VALID: Final = 1 << 4
TP_STATUS_CSUM_VALID: Final = 1 << 7
PACKET_OTHERHOST: Final = 3

TPACKET2_HDR: Final = np.dtype(
    [
        ("tp_status", "<u4"),
        ("tp_len", "<u4"),
        ("tp_snaplen", "<u4"),
        ("tp_mac", "<u2"),
        ("tp_net", "<u2"),
        ("tp_sec", "<u4"),
        ("tp_nsec", "<u4"),
        ("tp_vlan_tci", "<u2"),
        ("tp_vlan_tpid", "<u2"),
        ("tp_padding", "u1", (4,)),
    ]
)
SOCKADDR_LL: Final = np.dtype(
    [
        ("sll_family", "<u2"),
        ("sll_protocol", ">u2"),
        ("sll_ifindex", "<i4"),
        ("sll_hatype", "<u2"),
        ("sll_pkttype", "u1"),
        ("sll_halen", "u1"),
        ("sll_addr", "u1", (8,)),
    ]
)
# linux/virtio_net.h; without num_buffers, as PACKET_VNET_HDR has it
VIRTIO_NET_HDR: Final = np.dtype(
    [
        ("flags", "u1"),
        ("gso_type", "u1"),
        ("hdr_len", "<u2"),
        ("gso_size", "<u2"),
        ("csum_start", "<u2"),
        ("csum_offset", "<u2"),
    ]
)
VIRTIO_NET_HDR_GSO_NONE: Final = 0
VIRTIO_NET_HDR_GSO_UDP_L4: Final = 5

# sys/socket.h, netinet/in.h on x86-64 and aarch64
IOVEC: Final = np.dtype([("iov_base", "<i8"), ("iov_len", "<i8")])
MSGHDR: Final = np.dtype(
    [
        ("msg_name", "<i8"),
        ("msg_namelen", "<u4"),
        ("pad0", "<u4"),
        ("msg_iov", "<i8"),
        ("msg_iovlen", "<i8"),
        ("msg_control", "<i8"),
        ("msg_controllen", "<i8"),
        ("msg_flags", "<i4"),
        ("pad1", "<u4"),
    ]
)
MMSGHDR: Final = np.dtype([("msg_hdr", MSGHDR), ("msg_len", "<u4"), ("pad", "<u4")])
SOCKADDR_IN: Final = np.dtype(
    [("sin_family", "<u2"), ("sin_port", "<u2"), ("sin_addr", "<u4"), ("sin_zero", "u1", (8,))]
)

AF_INET: Final = 2
MSG_DONTWAIT: Final = 0x40
MSG_NOSIGNAL: Final = 0x4000

# linux/io_uring.h
IORING_OP_SENDMSG: Final = 9
IO_URING_SQE: Final = np.dtype(
    [
        ("opcode", "u1"),
        ("flags", "u1"),
        ("ioprio", "<u2"),
        ("fd", "<i4"),
        ("off", "<i8"),
        ("addr", "<i8"),
        ("len", "<u4"),
        ("msg_flags", "<u4"),
        ("user_data", "<i8"),
        ("buf_index", "<u2"),
        ("personality", "<u2"),
        ("splice_fd_in", "<i4"),
        ("addr3", "<i8"),
        ("pad2", "<i8"),
    ]
)
IO_URING_CQE: Final = np.dtype([("user_data", "<i8"), ("res", "<i4"), ("flags", "<u4")])

# One control buffer a send: the three messages that a datagram can need, in this order.
# Sizes are CMSG_SPACE of their payloads (man 3 cmsg).
CMSG_UDP_SEGMENT_BYTES: Final = 24
CMSG_IP_TTL_BYTES: Final = 24
CMSG_IP_PKTINFO_BYTES: Final = 32
CMSG_BYTES: Final = CMSG_UDP_SEGMENT_BYTES + CMSG_IP_TTL_BYTES + CMSG_IP_PKTINFO_BYTES

# What one SQE points to. It must stay in place until its completion is reaped.
SEND_SLOT: Final = np.dtype(
    [
        ("msg", MSGHDR),
        ("iov", IOVEC),
        ("name", SOCKADDR_IN),
        ("control", "u1", (CMSG_BYTES,)),
        ("output", "<i4"),
        ("batch", "<i4"),
        ("datagrams", "<i4"),
        ("gso", "<i4"),
    ],
    align=True,
)

UDP_SEGMENTS_MAX: Final = 64  # UDP_MAX_SEGMENTS, linux/udp.h, before it was raised to 128
UDP_PAYLOAD_MAX: Final = 65507  # 65535 less IPv4 and UDP headers

# Neighbouring datagrams that leave together. `entry` names the match, `src` and `ttl` are part of
# its identity only when an output of that entry needs them.
BATCH: Final = np.dtype(
    [
        ("entry", "<i4"),
        ("src", "<u4"),
        ("ttl", "<i4"),
        ("segment_bytes", "<i4"),
        ("datagrams", "<i4"),
        ("iovecs", "<i4"),
        ("bytes", "<i4"),
        ("sealed", "<i4"),
        ("sport", "<i4"),
        ("pad", "<i4"),
    ]
)

# A parsed datagram, or super-frame of `datagrams` datagrams of `segment_bytes`.
DATAGRAM: Final = np.dtype(
    [
        ("src", "<u4"),
        ("dst", "<u4"),
        ("sport", "<i4"),
        ("dport", "<i4"),
        ("ttl", "<i4"),
        ("datagrams", "<i4"),
        ("segment_bytes", "<i4"),
        ("payload_bytes", "<i4"),
        ("payload", "<i8"),
        ("received_ns", "<i8"),  # CLOCK_REALTIME, by the kernel that filled the ring
    ]
)

# --- the compiled rule table: written by the supervisor, mapped read-only by workers ---------------

TABLE_MAGIC: Final = 0x3145_4C42_4154_434D  # "MCTABLE1"
TABLE_HEADER: Final = np.dtype(
    [
        ("magic", "<i8"),
        ("generation", "<i8"),
        ("key_slots", "<i8"),
        ("entries", "<i8"),
        ("routes", "<i8"),
        ("route_outputs", "<i8"),
        ("outputs", "<i8"),
        ("own_slots", "<i8"),
        ("rules", "<i8"),
        ("guards", "<i8"),
        ("protected", "<i8"),
    ]
)
KEY: Final = np.dtype([("dst", "<u4"), ("src", "<u4"), ("port", "<u2"), ("ring", "<u2"), ("entry", "<i4")])
ENTRY_HAS_SOURCES: Final = 1  # source-specific entries exist beside this one
ENTRY_VARIES_BY_SOURCE: Final = 2  # some output preserves the source address
ENTRY_VARIES_BY_TTL: Final = 4  # some output sends the incoming TTL less 1
# `protection`: 0, or the number of a PROTECTED plus 1
ENTRY: Final = np.dtype([("first_route", "<u4"), ("routes", "<u4"), ("flags", "<u4"), ("protection", "<u4")])
SEAMLESS: Final = 0
FAILOVER: Final = 1
PROTECTED_LEGS: Final = 2
# Of an entry with a protected rule: which leg comes here. `twin` is the entry without that rule, for what is withheld
# from it; -1 when there is none.
PROTECTED: Final = np.dtype(
    [("record", "<u4"), ("leg", "<u4"), ("mode", "<u4"), ("twin", "<i4"), ("stall_ns", "<i8"), ("pad", "<i8")]
)
ROUTE: Final = np.dtype([("rule", "<u4"), ("first_output", "<u4"), ("outputs", "<u4"), ("guard", "<u4")])  # 0: none
ROUTE_OUTPUT: Final = np.dtype([("output", "<u4")])
OUTPUT_CONNECTED: Final = 1
OUTPUT_PRESERVE_SOURCE: Final = 2
OUTPUT_TTL_DECREMENT: Final = 4
OUTPUT_WAITING: Final = 8  # has no socket: its interface is away, down or without an address
OUTPUT: Final = np.dtype(
    [
        ("addr", "<u4"),  # network byte order, as sockaddr_in has it
        ("port", "<u2"),  # network byte order
        ("flags", "<u2"),
        ("socket", "<i4"),  # index into the worker's table of egress descriptors
        ("gso_segment_bytes_max", "<i4"),  # MTU less headers
    ]
)
# An egress socket of this relay. `addr` 0: it preserves sources, so `dst` and `dport` decide.
OWN_SOURCE: Final = np.dtype([("addr", "<u4"), ("dst", "<u4"), ("port", "<u2"), ("dport", "<u2"), ("used", "<u4")])
RULE_NAME_BYTES_MAX: Final = 64
LOG_RULE_NAME_BYTES_MAX: Final = 20  # a log record's pair holds no more
RULE_NAME: Final = np.dtype([("length", "<i4"), ("name", "u1", (LOG_RULE_NAME_BYTES_MAX,))])
GUARD: Final = np.dtype([("max_pps", "<i8"), ("max_bps", "<i8")])  # of a rule; 0: no limit. A route counts from 1
# A mapped table as compiled code takes it: the addresses of its arrays.
TABLE: Final = np.dtype(
    [
        ("generation", "<i8"),
        ("keys", "<i8"),
        ("keys_mask", "<i8"),
        ("entries", "<i8"),
        ("routes", "<i8"),
        ("route_outputs", "<i8"),
        ("outputs", "<i8"),
        ("own", "<i8"),
        ("own_mask", "<i8"),
        ("rule_names", "<i8"),
        ("guards", "<i8"),
        ("protected", "<i8"),
    ]
)

# --- the buckets of guarded rules: one memory file, written by every worker, emptied by the supervisor ---

# When the bucket would be full again (guard.py), in 1/16 ns of CLOCK_MONOTONIC; 0: never used. By a rule's slot.
GUARD_CELL: Final = np.dtype(
    {"names": ["packets_due", "bits_due"], "formats": ["<i8", "<i8"], "offsets": [0, 8], "itemsize": 64}
)

# --- counters: written by one worker, read by anyone --------------------------------------------


class DropCause(IntEnum):
    """Why a datagram did not leave. The names are those of metrics, logs and mcrctl."""

    NONE = 0
    TRUNCATED = 1  # larger than a slot, and the kernel's copy queue had no room
    PARSE_ERROR = 2  # headers that contradict each other or the frame's length
    FRAGMENT = 3  # an IP fragment that the kernel did not reassemble
    CHECKSUM = 4  # IP or UDP checksum wrong
    NO_MATCH = 5  # no rule for it
    OWN_EGRESS = 6  # sent by this relay itself
    TTL = 7  # decrement reached 0
    EGRESS_FULL = 8  # the socket buffer or the device queue had no room
    SEND_ERROR = 9  # the kernel refused: errno is counted beside
    RING_FULL = 10  # the kernel found no free slot for a frame; counted by the kernel, kept by the supervisor
    RATE_LIMIT = 11  # over the limit of its rule; counted once for the rule, not for each output


DROP_CAUSES: Final = 16  # room for causes to come
ERRNO_MAX: Final = 134  # asm-generic/errno.h ends at EHWPOISON 133
RULES_MAX: Final = 16_384
OUTPUTS_MAX: Final = 32_768
RINGS_MAX: Final = 16  # ingress interfaces of one relay

STATS_MAGIC: Final = 0x3153_5441_5453_434D  # "MCSTATS1"
STATS_HEADER: Final = np.dtype(
    {
        "names": [
            "magic",
            "core",
            "pid",
            "protections_offset",
            "protection_bytes",
            "doorbell",
            "ring_full",
            "release",
            "heartbeat_ns",
            "generation_seen",
            "packets_in",
            "bytes_in",
            "packets_matched",
            "bytes_matched",
            "packets_relayed",
            "bytes_relayed",
            "deliveries",
            "passes",
            "wakeups",
            "sends",
            "packets_withheld",
            "drops",
            "ring_sent",
            "ring_fill_max",
            "errno_counts",
            "ring_fill_percent",
        ],
        "formats": [
            "<i8",
            "<i8",
            "<i8",
            "<i8",
            "<i8",
            "<i8",
            "<i8",
            "<i8",
            "<i8",
            "<i8",
            "<i8",
            "<i8",
            "<i8",
            "<i8",
            "<i8",
            "<i8",
            "<i8",
            "<i8",
            "<i8",
            "<i8",
            "<i8",
            ("<i8", (DROP_CAUSES,)),
            ("<i8", (RINGS_MAX,)),
            ("<i8", (RINGS_MAX,)),
            ("<i8", (ERRNO_MAX,)),
            ("<i8", (RINGS_MAX,)),
        ],
        # The supervisor writes the line of the doorbell, the worker the rest.
        "offsets": [
            *(0, 8, 16, 24, 32),
            *(64, 72, 80),
            *(128, 136),
            *(192, 200, 208, 216, 224, 232, 240, 248, 256, 264, 272),
            *(320, 448, 576, 704),
            1792,
        ],
        "itemsize": 4096,
    }
)
RELEASE_NOW: Final = 1  # of `release`: end after this pass, another worker goes on with the rings
RELEASE_DRAINED: Final = 2  # end when the rings are empty
RULE_STATS: Final = np.dtype([("packets", "<i8"), ("bytes", "<i8"), ("last_ns", "<i8"), ("drops_rate_limit", "<i8")])
OUTPUT_STATS: Final = np.dtype(
    [
        ("packets", "<i8"),
        ("bytes", "<i8"),
        ("drops_ttl", "<i8"),
        ("drops_full", "<i8"),
        ("drops_error", "<i8"),
        ("last_errno", "<i8"),
        ("pad", "<i8", (2,)),
    ]
)
STATS_RULES_OFFSET: Final = STATS_HEADER.itemsize
STATS_OUTPUTS_OFFSET: Final = STATS_RULES_OFFSET + RULES_MAX * RULE_STATS.itemsize

# How long datagrams were in the relay: log-linear buckets, as HdrHistogram's (latency.py).
LATENCY_NS_MIN_LOG2: Final = 10  # below 1.024 us all is one bucket
LATENCY_NS_MAX_LOG2: Final = 34  # from 17.2 s on, too
LATENCY_SUB_BUCKETS_LOG2: Final = 4  # of a power of two: a bucket is 1/16 of its lower bound wide
LATENCY_BUCKETS: Final = 2 + ((LATENCY_NS_MAX_LOG2 - LATENCY_NS_MIN_LOG2) << LATENCY_SUB_BUCKETS_LOG2)
HEALTH: Final = np.dtype(
    {
        "names": ["looked_ns", "streams_seen", "streams_evicted", "frames_untracked", "latency_ns_max", "latency"],
        "formats": ["<i8", "<i8", "<i8", "<i8", "<i8", ("<i8", (LATENCY_BUCKETS,))],
        "offsets": [0, 8, 16, 24, 32, 64],
        "itemsize": 4096,
    }
)

STREAMS_MAX: Final = 1024  # of a worker; what fits no more is counted
PIDS_MAX: Final = 64  # of a stream


class Payload(IntFlag):
    """What a stream carries, as far as its datagrams tell. A transport stream may be in RTP."""

    UDP = 0
    RTP = 1
    MPEG_TS = 2


# A stream: the datagrams of one sender to one input of one interface. First what every datagram touches.
# `_ns` without a word before it is CLOCK_MONOTONIC; `received_ns` is the kernel's, CLOCK_REALTIME.
STREAM: Final = np.dtype(
    [
        ("number", "<i8"),  # counts the streams that were here, and is 0 while the record is empty or changes hands
        ("src", "<u4"),
        ("dst", "<u4"),
        ("sport", "<u2"),
        ("dport", "<u2"),
        ("ring", "<u2"),
        ("kind", "<u2"),  # Payload
        ("packets", "<i8"),
        ("bytes", "<i8"),
        ("first_ns", "<i8"),
        ("last_ns", "<i8"),
        ("received_ns", "<i8"),  # the last one
        # RTP, RFC 3550
        ("ssrc", "<u4"),
        ("payload_type", "<u2"),
        ("misfits", "<u2"),  # datagrams in a row that are no RTP
        ("sequence", "<i8"),  # the highest, extended by the number of times that it went round
        ("timestamp", "<i8"),  # of the last one; -1: the next begins anew
        ("tick_ns_16", "<i8"),  # of the media clock, times 2^16; 0: unknown
        ("jitter_ns_16", "<i8"),  # times 16, as RFC 3550 A.8 keeps it
        ("jitter_ns_16_max", "<i8"),
        ("missing_low", "<i8"),  # bit i: the datagram i before the highest has not come
        ("missing_high", "<i8"),  # i from 64 on
        ("sequence_first", "<i8"),  # extended likewise
        ("bad_sequence", "<i8"),  # what would follow a jump; -1: none
        ("rtp_lost", "<i8"),
        ("rtp_reordered", "<i8"),
        ("rtp_duplicates", "<i8"),
        ("ssrc_changes", "<i8"),
        ("sequence_restarts", "<i8"),
        ("malformed", "<i8"),  # not what the stream carries
        # recognition, and gaps of any stream
        ("rtp_run", "<i8"),  # datagrams that look like RTP, one after the other
        ("cell_run", "<i8"),  # likewise, of whole transport stream packets
        ("gaps", "<i8"),  # longer than STALL_NS_MIN
        ("gap_ns", "<i8"),  # the last of them
        ("gap_end_ns", "<i8"),
        ("gap_ns_max", "<i8"),
        ("pad", "<i8", (2,)),
        # MPEG-TS, ISO/IEC 13818-1, ETSI TR 101 290
        ("cells", "<i8"),
        ("sync_byte_errors", "<i8"),
        ("sync_losses", "<i8"),
        ("transport_errors", "<i8"),
        ("continuity_errors", "<i8"),
        ("cells_untracked", "<i8"),  # of PIDs that fit no more
        ("sync_run", "<i8"),  # cells in a row with a sync byte, or, negative, without one
        ("pids", "<i8"),
        ("pcr_gaps", "<i8"),
        ("pcr_discontinuities", "<i8"),
        ("pat_gaps", "<i8"),
        ("pat_received_ns", "<i8"),
        ("rate_pid", "<i8"),  # plus 1: the bit rate is measured between its PCRs
        ("rate_pcr", "<i8"),
        ("rate_cells", "<i8"),
        ("bits_per_second", "<i8"),
    ]
)
PID: Final = np.dtype(
    [
        ("pid", "<i8"),  # plus 1; 0: free
        ("continuity", "<i8"),  # the last counter, plus CONTINUITY_REPEATED
        ("cells", "<i8"),
        ("continuity_errors", "<i8"),
        ("pcr", "<i8"),  # 27 MHz, plus 1; 0: none yet
        ("pcr_received_ns", "<i8"),
    ]
)
STATS_HEALTH_OFFSET: Final = STATS_OUTPUTS_OFFSET + OUTPUTS_MAX * OUTPUT_STATS.itemsize
STATS_STREAMS_OFFSET: Final = STATS_HEALTH_OFFSET + HEALTH.itemsize
STATS_PIDS_OFFSET: Final = STATS_STREAMS_OFFSET + STREAMS_MAX * STREAM.itemsize
STATS_PROTECTIONS_OFFSET: Final = STATS_PIDS_OFFSET + STREAMS_MAX * PIDS_MAX * PID.itemsize

# What became of the two legs of protected rules (protect.py). One worker reads both legs of a rule, and writes.
PROTECTIONS_MAX: Final = 512  # protected rules: one core merges them all
MERGE_WINDOW: Final = 32_768  # sequence numbers of which it is known whether they were let through
LEG: Final = np.dtype(
    [
        ("packets", "<i8"),
        ("firsts", "<i8"),  # of those, let through
        ("expected", "<i8"),  # by RTP sequence numbers: what of it is no packet was missing
        ("last_ns", "<i8"),  # CLOCK_MONOTONIC
        ("received_ns", "<i8"),  # the kernel's, CLOCK_REALTIME
        ("ssrc", "<u4"),
        ("sequence", "<i4"),  # the highest; -1 before the first
        ("bad_ssrc", "<u4"),
        ("bad_sequence", "<i4"),  # what would follow a jump; -1: none
        ("in_step", "<i4"),  # its sequence numbers are those of the record
        ("pad", "<i4"),
    ]
)
PROTECTION: Final = np.dtype(
    [
        ("identity", "<i8"),  # of the rule; 0: none. Written by the supervisor, before a table names the record
        ("begun_ns", "<i8"),  # likewise
        ("highest", "<i8"),  # sequence number, extended; -1 before the first RTP
        ("ssrc", "<u4"),
        ("active", "<u4"),  # leg that is let through, of a fail-over
        ("since_ns", "<i8"),  # the primary has not been silent for longer than a stall since then
        ("switches", "<i8"),  # from leg to leg; SSRCs and restarts of a seamless one
        ("withheld", "<i8"),
        ("not_rtp", "<i8"),
        ("legs", LEG, (PROTECTED_LEGS,)),
        ("passed", "<i8", (MERGE_WINDOW // 64,)),  # bit n: the sequence number n modulo MERGE_WINDOW was let through
    ]
)
# What was let through since frames were last handed to the kernel: who goes on after a killed worker takes it back.
JOURNAL_ENTRIES: Final = 65_536  # no frame holds more datagrams
JOURNAL_SEQUENCE_BITS: Final = 48
JOURNAL: Final = np.dtype([("count", "<i8"), ("pad", "<i8", (7,)), ("entries", "<i8", (JOURNAL_ENTRIES,))])
STATS_JOURNAL_OFFSET: Final = STATS_PROTECTIONS_OFFSET + PROTECTIONS_MAX * PROTECTION.itemsize
STATS_BYTES: Final = STATS_JOURNAL_OFFSET + JOURNAL.itemsize


COUNT_MAX: Final = (1 << 63) - 1  # that a counter holds


def offset_of(layout: np.dtype[Any], field: str) -> int:
    """The byte offset of `field` in `layout`."""
    fields = layout.fields
    assert fields is not None
    return int(fields[field][1])
