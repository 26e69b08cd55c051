"""The loop: where the stages of the data path meet. One worker process runs it, pinned to one core.

    packet ring ─▶ read_frame ─▶ match ─▶ add ─▶ drain ─▶ release
    (ring.py)      (parse.py)   (match)  (coalesce)  (send)  (ring)

A pass takes what the rings hold, at most PASS_FRAMES_MAX frames of each, sends it, and only then gives
the slots back, so a worker that dies in a pass leaves its frames in the ring for the next one. The loop
returns to the interpreter for a message from the supervisor, never for a packet.
"""

from typing import Any

from numba import njit

from logging_shm.atomics import int64, load_acquire_i64, load_i64, store_release_i64
from logging_shm.compiled import write_event
from relay.dataplane import events
from relay.dataplane.coalesce import add, drain, log_first_packets
from relay.dataplane.layout import (
    DROP_CAUSES,
    RINGS_MAX,
    STATS_HEADER,
    DropCause,
    offset_of,
)
from relay.dataplane.match import NO_ENTRY, is_own_source, match
from relay.dataplane.memory import PASS_FRAMES_MAX
from relay.dataplane.ring import (
    fetch_copies,
    is_filled,
    needs_fetch,
    read_frame,
    release,
    slot_address,
)
from relay.dataplane.send import trace_is_on
from relay.dataplane.syscalls import clock_gettime, clock_nanosleep, getsockopt, poll

NONE = int(DropCause.NONE)
NO_MATCH = int(DropCause.NO_MATCH)
OWN_EGRESS = int(DropCause.OWN_EGRESS)
TTL = int(DropCause.TTL)
EGRESS_FULL = int(DropCause.EGRESS_FULL)
SEND_ERROR = int(DropCause.SEND_ERROR)

IDLE_ADAPTIVE = 0
IDLE_SLEEP = 1
IDLE_SPIN = 2
BUSY_FRAMES_MIN = 4  # in a pass: then the next ones are so near that a nap costs less than a wake-up
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
DOORBELL_OFFSET = offset_of(STATS_HEADER, "doorbell")
HEARTBEAT_OFFSET = offset_of(STATS_HEADER, "heartbeat_ns")

# Why the loop returned.
CONTROL = 1
DRAINED = 2


@njit(cache=True, nogil=True, _nrt=False)
def monotonic_ns(m: Any) -> int:
    """CLOCK_MONOTONIC in nanoseconds; a vDSO call, no system call."""
    address = m.timespec.ctypes.data
    clock_gettime(CLOCK_MONOTONIC, address)
    return int64(load_i64(address)) * 1_000_000_000 + int64(load_i64(address + 8))


@njit(cache=True, nogil=True, _nrt=False)
def relay_frame(m: Any, t: Any, ring_index: int, slot: int) -> None:
    """Take one frame through parse, match and coalesce, or count why it goes no further."""
    cause = read_frame(m, ring_index, slot)
    datagram = m.datagram[0]
    stats = m.stats[0]
    stats.packets_in += datagram.datagrams
    stats.bytes_in += datagram.payload_bytes
    entry = NO_ENTRY
    if cause == NONE:
        entry = match(t.keys, t.entries, datagram.dst, datagram.dport, ring_index, datagram.src)
        if entry == NO_ENTRY:
            cause = NO_MATCH
        elif is_own_source(t.own, datagram.src, datagram.sport, datagram.dst, datagram.dport):
            cause = OWN_EGRESS
    if cause != NONE:
        stats.drops[cause] += datagram.datagrams
        return
    stats.packets_matched += datagram.datagrams
    stats.bytes_matched += datagram.payload_bytes
    if m.state[0].trace:
        write_event(
            m.log_ingress, SEVERITY_DEBUG, events.RECEIVED, m.state[0].now_ns,
            (datagram.src, datagram.sport, datagram.dst, datagram.dport, datagram.datagrams, datagram.payload_bytes),
        )  # fmt: skip
    log_first_packets(m, t, entry, datagram)
    add(m, t, entry, datagram)


@njit(cache=True, nogil=True, _nrt=False)
def take_frames(m: Any, t: Any, ring_index: int) -> int:
    """Take the filled frames of one ring, at most PASS_FRAMES_MAX and never the whole ring twice."""
    ring = m.rings[ring_index]
    limit = min(PASS_FRAMES_MAX, ring.frames)
    for position in range(limit):
        slot = slot_address(ring, position)
        if not is_filled(slot):
            break
        if needs_fetch(m, ring_index, slot):
            drain(m, t)
            fetch_copies(m, ring_index)
        relay_frame(m, t, ring_index, slot)
        ring.taken = position + 1
    return ring.taken


@njit(cache=True, nogil=True, _nrt=False)
def run_pass(m: Any, t: Any) -> int:
    """One pass over all rings; return the number of frames."""
    taken = int64(0)
    for ring_index in range(RINGS_MAX):
        if m.rings[ring_index].active:
            taken += take_frames(m, t, ring_index)
    if taken == 0:
        return 0
    drain(m, t)
    for ring_index in range(RINGS_MAX):
        ring = m.rings[ring_index]
        if ring.taken:
            watch_fill(m, ring_index)
            release(ring)
    m.stats[0].passes += 1
    return taken


@njit(cache=True, nogil=True, _nrt=False)
def watch_fill(m: Any, ring_index: int) -> None:
    """Log when the ring's occupancy passes a level, and once when it is back under the lowest."""
    ring = m.rings[ring_index]
    reached = int64(0)
    for level in FILL_LEVELS_PERCENT:
        if is_filled(slot_address(ring, ring.frames * level // 100)):
            reached = level
    m.stats[0].ring_fill_max[ring_index] = max(m.stats[0].ring_fill_max[ring_index], reached)
    if reached > ring.fill_level:
        write_event(m.log_bufferpool, SEVERITY_WARNING, events.RING_FILL_ABOVE, 0, (ring_index, reached))
        ring.fill_level = reached
    elif reached == 0 and ring.fill_level:
        lowest = FILL_LEVELS_PERCENT[0]
        write_event(m.log_bufferpool, SEVERITY_NOTICE, events.RING_FILL_BELOW, 0, (ring_index, lowest))
        ring.fill_level = 0


@njit(cache=True, nogil=True, _nrt=False)
def report_drops(m: Any) -> None:
    """Log what was dropped since the last report, one record a cause. Called once a second."""
    for cause in range(1, DROP_CAUSES):
        total = m.stats[0].drops[cause]
        if total == m.reported[cause] or cause == NO_MATCH:
            continue
        log = m.log_egress if cause in (TTL, EGRESS_FULL, SEND_ERROR) else m.log_ingress
        event = events.DROPS_BY_CAUSE_FIRST + cause
        write_event(log, SEVERITY_WARNING, event, 0, (total - m.reported[cause], total))
        m.reported[cause] = total


@njit(cache=True, nogil=True, _nrt=False)
def sleep_until_readable(m: Any, timeout_ms: int) -> bool:
    """Wait for a frame or a message of the supervisor; True for the message."""
    state = m.state[0]
    m.pollfds[0].fd = state.control_fd
    m.pollfds[0].events = POLLIN
    count = 1
    for ring_index in range(RINGS_MAX):
        ring = m.rings[ring_index]
        if ring.active:
            m.pollfds[count].fd = ring.fd
            m.pollfds[count].events = POLLIN
            count += 1
    poll(m.pollfds.ctypes.data, count, timeout_ms)
    m.stats[0].wakeups += 1
    for i in range(1, count):
        # An interface that went down sets the socket's error once. Left there, every poll returns at once.
        if m.pollfds[i].revents & POLLERR:
            address = m.timespec.ctypes.data
            m.timespec[1] = 4
            getsockopt(m.pollfds[i].fd, SOL_SOCKET, SO_ERROR, address, address + 8)
    return (m.pollfds[0].revents & (POLLIN | POLLERR | POLLHUP)) != 0


@njit(cache=True, nogil=True, _nrt=False)
def on_timer(m: Any) -> bool:
    """Heartbeat, reports, trace switch; True when the supervisor sent something or is gone."""
    state = m.state[0]
    state.timer_ns = state.now_ns + TIMER_INTERVAL_NS
    store_release_i64(m.stats.ctypes.data + HEARTBEAT_OFFSET, state.now_ns)
    state.trace = 1 if trace_is_on(m) else 0
    if state.now_ns >= state.report_ns:
        state.report_ns = state.now_ns + REPORT_INTERVAL_NS
        report_drops(m)
    m.pollfds[0].fd = state.control_fd
    m.pollfds[0].events = POLLIN
    return poll(m.pollfds.ctypes.data, 1, 0) > 0


@njit(cache=True, nogil=True, _nrt=False)
def nap(m: Any, duration_ns: int) -> None:
    """Sleep for a time, whatever arrives: under load the next pass finds more to coalesce."""
    m.timespec[0] = 0
    m.timespec[1] = duration_ns
    clock_nanosleep(CLOCK_MONOTONIC, 0, m.timespec.ctypes.data, 0)


@njit(cache=True, nogil=True, _nrt=False)
def run(m: Any, t: Any) -> int:
    """Relay until the supervisor has something to say (CONTROL), or the rings are empty while draining."""
    state = m.state[0]
    doorbell = m.stats.ctypes.data + DOORBELL_OFFSET
    state.now_ns = monotonic_ns(m)
    busy_ns = state.now_ns
    empty_passes = 0
    while True:
        frames = run_pass(m, t)
        if load_acquire_i64(doorbell) != state.doorbell_seen:
            return CONTROL
        if frames:
            empty_passes = 0
            state.now_ns = monotonic_ns(m)
            busy_ns = state.now_ns
        elif state.draining:
            report_drops(m)
            return DRAINED
        if state.now_ns >= state.timer_ns and on_timer(m):
            return CONTROL
        if state.idle_mode == IDLE_ADAPTIVE and frames >= BUSY_FRAMES_MIN and not state.draining:
            nap(m, state.nap_ns)
            state.now_ns = monotonic_ns(m)
            continue
        if frames:
            continue
        empty_passes += 1
        if state.idle_mode != IDLE_SLEEP and empty_passes % EMPTY_PASSES_PER_CLOCK:
            continue
        state.now_ns = monotonic_ns(m)
        if state.idle_mode == IDLE_SPIN:
            continue
        if state.idle_mode == IDLE_ADAPTIVE and state.now_ns - busy_ns < state.spin_ns:
            continue
        if sleep_until_readable(m, POLL_TIMEOUT_MS):
            return CONTROL
        state.now_ns = monotonic_ns(m)
        # Frames may come without the spin being worth it: one look, then sleep again.
        empty_passes = 0
