"""The loop: where the stages of the data path meet. One worker process runs it, pinned to one core.

    packet ring ─▶ read_frame ─▶ match ─▶ observe ─▶ add ─▶ drain ─▶ release
    (ring.py)      (parse.py)   (match)  (streams) (coalesce) (send)  (ring)
                                          protect.py, for rules with two legs: before add

A pass takes what the rings hold, at most PASS_FRAMES_MAX frames of each, sends it, and only then gives
the slots back, so a worker that dies in a pass leaves its frames in the ring for the next one. The loop
returns to the interpreter for a message from the supervisor, never for a packet.
"""

from typing import Any

from logging_shm.atomics import int64, load_acquire_i64, store_release_i64
from logging_shm.compiled import write_event
from logging_shm.jit import compiled
from relay.dataplane import events
from relay.dataplane.coalesce import add, drain
from relay.dataplane.latency import begin_latency
from relay.dataplane.layout import (
    DROP_CAUSES,
    HEALTH,
    RINGS_MAX,
    STATS_HEADER,
    DropCause,
    offset_of,
)
from relay.dataplane.match import entry_at, flow_index
from relay.dataplane.memory import PASS_FRAMES_MAX, flow_at, i64_at, pollfd_at, ring_at, stats_at, timespec_of
from relay.dataplane.protect import relay_protected
from relay.dataplane.ring import fetch_copies, is_filled, needs_fetch, prefetch_frame, read_frame, release
from relay.dataplane.send import DROPS_OFFSET, count_drops, trace_is_on
from relay.dataplane.streams import cells_at, observe
from relay.dataplane.syscalls import clock_gettime, clock_nanosleep, getsockopt, poll

NONE = int(DropCause.NONE)
NO_MATCH = int(DropCause.NO_MATCH)
TTL = int(DropCause.TTL)
EGRESS_FULL = int(DropCause.EGRESS_FULL)
SEND_ERROR = int(DropCause.SEND_ERROR)
RATE_LIMIT = int(DropCause.RATE_LIMIT)

IDLE_ADAPTIVE = 0
IDLE_SLEEP = 1
IDLE_SPIN = 2
RATE_WINDOW_NS = 200_000  # over which the distance between datagrams is measured
NAP_GAP_NS = 6_000  # datagrams nearer than that: a nap saves more than half of the core, and finds many to coalesce
SPIN_GAP_NS = 100_000  # further apart than that: spinning for the next costs more than the wake-up that it saves
PREFETCH_FRAMES = 8  # ahead; with 2 a full ring takes 13 % longer
EMPTY_PASSES_PER_CLOCK = 64  # spinning reads the clock (20 ns) once in so many looks at the rings

CLOCK_MONOTONIC = 1
TIMER_INTERVAL_NS = 100_000_000
REPORT_INTERVAL_NS = 1_000_000_000
POLL_TIMEOUT_MS = 100
POLLIN = 0x001
POLLERR = 0x008
POLLHUP = 0x010
SOL_SOCKET = 1
SO_ERROR = 4
SEVERITY_WARNING = 4
SEVERITY_NOTICE = 5
SEVERITY_DEBUG = 7
FILL_LEVELS_PERCENT = (50, 80, 95)
FILL_PROBES_MAX = 32  # each halves the slots, of which there are less than 2^31: their number is an int of the kernel's
DOORBELL_OFFSET = offset_of(STATS_HEADER, "doorbell")
HEARTBEAT_OFFSET = offset_of(STATS_HEADER, "heartbeat_ns")
LOOKED_OFFSET = offset_of(HEALTH, "looked_ns")
FILL_MAX_OFFSET = offset_of(STATS_HEADER, "ring_fill_max")
FILL_OFFSET = offset_of(STATS_HEADER, "ring_fill_percent")

# Why the loop returned.
CONTROL = 1
DRAINED = 2


@compiled
def monotonic_ns(m: Any) -> int:
    """CLOCK_MONOTONIC in nanoseconds; a vDSO call, no system call."""
    clock_gettime(CLOCK_MONOTONIC, timespec_of(m))
    return m.timespec[0] * 1_000_000_000 + m.timespec[1]


@compiled
def relay_frame(m: Any, t: Any, ring: Any, ring_index: int, slot: int) -> None:
    """Take one frame through parse, match and coalesce, or count why it goes no further."""
    cause = read_frame(m, ring, ring_index, slot)
    datagram = m.datagram
    stats = stats_at(m.stats, 0)
    stats.packets_in += datagram.datagrams
    stats.bytes_in += datagram.payload_bytes
    if cause != NONE:
        count_drops(m, cause, datagram.datagrams)
        return
    flow = flow_at(m.flows, flow_index(m, t, datagram, ring_index))
    if flow.cause != NONE:
        count_drops(m, int64(flow.cause), datagram.datagrams)
        return
    stats.packets_matched += datagram.datagrams
    stats.bytes_matched += datagram.payload_bytes
    if m.trace:
        write_event(
            m.log_ingress, SEVERITY_DEBUG, events.RECEIVED, m.now_ns,
            (datagram.src, datagram.sport, datagram.dst, datagram.dport, datagram.datagrams, datagram.payload_bytes),
        )  # fmt: skip
    observe(m, flow, datagram, ring_index)
    m.cells_at = cells_at(m, flow, datagram, slot, ring.frame_bytes)
    entry = int64(flow.entry)
    if entry_at(t.entries, entry).protection:
        datagram.datagrams = relay_protected(m, t, entry, datagram)
        if datagram.datagrams == 0:
            return
    else:
        add(m, t, entry, datagram)
    begin_latency(m, datagram)


@compiled
def take_frames(m: Any, t: Any, ring_index: int) -> int:
    """Take filled frames: at most PASS_FRAMES_MAX, and half of the slots, so that the kernel can fill the others."""
    ring = ring_at(m.rings, ring_index)
    frames, frame_bytes = ring.frames, ring.frame_bytes
    position, ahead = ring.cursor, ring.cursor + PREFETCH_FRAMES
    for taken in range(min(PASS_FRAMES_MAX, (frames + 1) // 2)):
        slot = ring.base + position * frame_bytes
        if not is_filled(slot):
            break
        if ahead >= frames:
            ahead -= frames
        prefetch_frame(ring.base + ahead * frame_bytes, m.cells_at)
        if needs_fetch(ring, slot):
            drain(m, t)
            fetch_copies(m, ring_index)
        relay_frame(m, t, ring, ring_index, slot)
        ring.taken = taken + 1
        ahead += 1
        position += 1
        if position == frames:
            position = 0
    return ring.taken


@compiled
def run_pass(m: Any, t: Any) -> int:
    """One pass over all rings; return the number of frames."""
    taken = int64(0)
    for ring_index in range(RINGS_MAX):
        if ring_at(m.rings, ring_index).active:
            taken += take_frames(m, t, ring_index)
    if taken == 0:
        return 0
    drain(m, t)
    for ring_index in range(RINGS_MAX):
        ring = ring_at(m.rings, ring_index)
        if ring.taken:
            watch_fill(m, ring, ring_index)
            if ring.fill_due:
                publish_fill(m, ring, ring_index)
            release(m, ring, ring_index)
    stats_at(m.stats, 0).passes += 1
    return taken


@compiled
def watch_fill(m: Any, ring: Any, ring_index: int) -> None:
    """Log when the ring's occupancy passes a level, and once when it is back under the lowest."""
    reached = int64(0)
    for level in FILL_LEVELS_PERCENT:
        position = ring.cursor + ring.frames * level // 100
        if is_filled(ring.base + (position % ring.frames) * ring.frame_bytes):
            reached = level
    fill_max = i64_at(m.stats + FILL_MAX_OFFSET, ring_index)
    fill_max.value = max(fill_max.value, reached)
    if reached > ring.fill_level:
        write_event(m.log_bufferpool, SEVERITY_WARNING, events.RING_FILL_ABOVE, 0, (ring_index, reached))
        ring.fill_level = reached
    elif reached == 0 and ring.fill_level:
        lowest = FILL_LEVELS_PERCENT[0]
        write_event(m.log_bufferpool, SEVERITY_NOTICE, events.RING_FILL_BELOW, 0, (ring_index, lowest))
        ring.fill_level = 0


@compiled
def publish_fill(m: Any, ring: Any, ring_index: int) -> None:
    """Tell how full the ring is: percent of its slots, a part of one counts as one. Filled slots begin at the cursor.

    The kernel fills more meanwhile: the search finds some slot that is not filled behind one that is.
    """
    filled, beyond = int64(0), ring.frames + 1
    for _ in range(FILL_PROBES_MAX):
        if beyond - filled <= 1:
            break
        middle = (filled + beyond) // 2
        if is_filled(ring.base + (ring.cursor + middle - 1) % ring.frames * ring.frame_bytes):
            filled = middle
        else:
            beyond = middle
    fill = i64_at(m.stats + FILL_OFFSET, ring_index)
    fill.value = (filled * 100 + ring.frames - 1) // ring.frames
    ring.fill_due = 0


@compiled
def watch_fills(m: Any) -> None:
    """Have each ring's next pass publish how full it is. One that no frame has come to since the last time is empty."""
    for ring_index in range(RINGS_MAX):
        ring = ring_at(m.rings, ring_index)
        if ring.active:
            if ring.fill_due:
                publish_fill(m, ring, ring_index)
            ring.fill_due = 1


@compiled
def report_drops(m: Any) -> None:
    """Log what was dropped since the last report, one record a cause. Called once a second.

    Drops of a rule's limit are told by rule, by the supervisor (guards.py), and what no rule asks for is no news.
    """
    for cause in range(1, DROP_CAUSES):
        total = i64_at(m.stats + DROPS_OFFSET, cause).value
        reported = i64_at(m.reported, cause)
        if total == reported.value or cause in (NO_MATCH, RATE_LIMIT):
            continue
        log = m.log_egress if cause in (TTL, EGRESS_FULL, SEND_ERROR) else m.log_ingress
        event = events.DROPS_BY_CAUSE_FIRST + cause
        write_event(log, SEVERITY_WARNING, event, 0, (total - reported.value, total))
        reported.value = total


@compiled
def sleep_until_readable(m: Any, timeout_ms: int) -> bool:
    """Wait for a frame or a message of the supervisor; True for the message."""
    control = pollfd_at(m.pollfds, 0)
    control.fd = m.control_fd
    control.events = POLLIN
    count = 1
    for ring_index in range(RINGS_MAX):
        ring = ring_at(m.rings, ring_index)
        if ring.active:
            waiting = pollfd_at(m.pollfds, count)
            waiting.fd = ring.fd
            waiting.events = POLLIN
            count += 1
    poll(m.pollfds, count, timeout_ms)
    stats_at(m.stats, 0).wakeups += 1
    for i in range(1, count):
        waiting = pollfd_at(m.pollfds, i)
        # An interface that went down sets the socket's error once. Left there, every poll returns at once.
        if waiting.revents & POLLERR:
            m.timespec[1] = 4
            getsockopt(waiting.fd, SOL_SOCKET, SO_ERROR, timespec_of(m), timespec_of(m) + 8)
    return (control.revents & (POLLIN | POLLERR | POLLHUP)) != 0


@compiled
def note_look(m: Any) -> None:
    """Note that everything that came before has been taken, so that who waits for a stream knows that none came."""
    for ring_index in range(RINGS_MAX):
        if ring_at(m.rings, ring_index).active:
            store_release_i64(m.health + LOOKED_OFFSET, m.now_ns)
            return


@compiled
def on_timer(m: Any) -> bool:
    """Heartbeat, reports, trace switch; True when the supervisor sent something or is gone."""
    m.timer_ns = m.now_ns + TIMER_INTERVAL_NS
    store_release_i64(m.stats + HEARTBEAT_OFFSET, m.now_ns)
    note_look(m)
    watch_fills(m)
    m.trace = 1 if trace_is_on(m) else 0
    if m.now_ns >= m.report_ns:
        m.report_ns = m.now_ns + REPORT_INTERVAL_NS
        report_drops(m)
    control = pollfd_at(m.pollfds, 0)
    control.fd = m.control_fd
    control.events = POLLIN
    return poll(m.pollfds, 1, 0) > 0


@compiled
def measure_gap(m: Any) -> None:
    """Keep the mean distance of datagrams over the last window, by which adaptive idling chooses."""
    elapsed_ns = m.now_ns - m.gap_since_ns
    if elapsed_ns < RATE_WINDOW_NS:
        return
    packets = stats_at(m.stats, 0).packets_in
    m.gap_ns = elapsed_ns // max(packets - m.gap_packets, 1)
    m.gap_packets = packets
    m.gap_since_ns = m.now_ns


@compiled
def spin_limit_ns(m: Any) -> int:
    """How long to look for the next datagram before sleeping."""
    if m.idle_mode == IDLE_ADAPTIVE and m.gap_ns <= SPIN_GAP_NS:
        return int64(m.spin_ns)
    return 0


@compiled
def nap(m: Any, duration_ns: int) -> None:
    """Sleep for a time, whatever arrives: under load the next pass finds more to coalesce."""
    m.timespec[0] = 0
    m.timespec[1] = duration_ns
    clock_nanosleep(CLOCK_MONOTONIC, 0, timespec_of(m), 0)


@compiled
def run(m: Any, t: Any) -> int:
    """Relay until the supervisor has something to say (CONTROL), or the rings are empty while draining."""
    doorbell = m.stats + DOORBELL_OFFSET
    m.now_ns = monotonic_ns(m)
    busy_ns = m.now_ns
    empty_passes = 0
    while True:
        frames = run_pass(m, t)
        if load_acquire_i64(doorbell) != m.doorbell_seen:
            return CONTROL
        if frames:
            empty_passes = 0
            m.now_ns = monotonic_ns(m)
            busy_ns = m.now_ns
            measure_gap(m)
        elif m.draining:
            report_drops(m)
            return DRAINED
        if m.now_ns >= m.timer_ns and on_timer(m):
            return CONTROL
        if m.idle_mode == IDLE_ADAPTIVE and frames and m.gap_ns <= NAP_GAP_NS and not m.draining:
            nap(m, m.nap_ns)
            m.now_ns = monotonic_ns(m)
            continue
        if frames:
            continue
        empty_passes += 1
        if m.idle_mode != IDLE_SLEEP and empty_passes % EMPTY_PASSES_PER_CLOCK:
            continue
        m.now_ns = monotonic_ns(m)
        if m.idle_mode == IDLE_SPIN:
            continue
        if m.now_ns - busy_ns < spin_limit_ns(m):
            continue
        if sleep_until_readable(m, POLL_TIMEOUT_MS):
            return CONTROL
        m.now_ns = monotonic_ns(m)
        # Frames may come without the spin being worth it: one look, then sleep again.
        empty_passes = 0
