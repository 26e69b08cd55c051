"""Protect: of a rule with two legs, what comes by both leaves once. One worker reads both legs of a rule.

    match ─▶ protection of the entry ─┬─ let through ─▶ add to the entry
                                      └─ withheld ─▶ add to its twin, where other rules share the input; or nothing

Seamless (as SMPTE ST 2022-7): RTP, of which the first copy of each sequence number is let through, as it comes: nothing
is ever held back. Fail-over: datagrams of the primary, and of the secondary while the primary is silent.

State is in PROTECTION records of the stats segment, written by this worker alone, so that who follows a killed worker
goes on in it. What was let through and not handed to the kernel yet, the follower finds in the ring again: the journal
tells what to take back (`take_back`). Followed as in RFC 3550 A.1: a leg that jumps back, or changes its SSRC, is
believed at the second datagram in sequence. Then the record begins anew, and the other leg is out of step until it does
so, too: what it still brings of before would leave twice.
"""

from typing import Any

import numpy as np

from logging_shm.atomics import int64, store_i64, store_release_i64
from logging_shm.jit import compiled
from relay.dataplane import layout
from relay.dataplane.coalesce import add, close_batch, drain
from relay.dataplane.layout import (
    FAILOVER,
    JOURNAL,
    JOURNAL_ENTRIES,
    JOURNAL_SEQUENCE_BITS,
    LEG,
    MERGE_WINDOW,
    PROTECTED,
    PROTECTION,
    PROTECTIONS_MAX,
    offset_of,
)
from relay.dataplane.match import entry_at
from relay.dataplane.memory import BATCHES_MAX, i32_at, i64_at, open_batch_at, stats_at
from relay.dataplane.parse import be16, be32
from relay.dataplane.records import record_at
from relay.dataplane.rtp import header_bytes

PRIMARY, SECONDARY = 0, 1
DROPOUT_MAX = 3000  # RFC 3550 A.1
MISORDER_MAX = 1000  # there 100; a path of several lanes may bring a burst that late, at 100 000 datagrams/s in 10 ms
STEP_NS = 1_000_000_000  # longer than legs are apart: after that a leg out of step may be believed
NOTHING = -1
NO_TWIN = -1
PROTECTION_BYTES = PROTECTION.itemsize
LEG_BYTES = LEG.itemsize
LEGS_OFFSET = offset_of(PROTECTION, "legs")
PASSED_OFFSET = offset_of(PROTECTION, "passed")
PASSED_WORDS = MERGE_WINDOW // 64
ENTRIES_OFFSET = offset_of(JOURNAL, "entries")
EXTENDED_MASK = (1 << JOURNAL_SEQUENCE_BITS) - 1

protected_at = record_at(PROTECTED)
protection_at = record_at(PROTECTION)
leg_at = record_at(LEG)


@compiled
def legs_of(m: Any, number: int) -> int:
    """The address of the LEG records of a record."""
    return m.protections + number * PROTECTION_BYTES + LEGS_OFFSET


@compiled
def passed_of(m: Any, number: int) -> int:
    """The address of the bits of a record."""
    return m.protections + number * PROTECTION_BYTES + PASSED_OFFSET


@compiled
def clear_passed(passed: int, first: int, count: int) -> None:
    """Forget what was let through of `count` sequence numbers from `first` on, at most MERGE_WINDOW."""
    while count > 0:
        shift = first & 63
        taken = min(64 - shift, count)
        mask = int64(-1) if taken == 64 else ((int64(1) << taken) - 1) << shift
        word = i64_at(passed, (first >> 6) & (PASSED_WORDS - 1))
        word.value = word.value & ~mask
        first += taken
        count -= taken


@compiled
def begin(m: Any, number: int, record: Any, ssrc: int, sequence: int) -> None:
    """Nothing is known of sequence numbers before this one."""
    clear_passed(passed_of(m, number), 0, MERGE_WINDOW)
    record.ssrc = ssrc
    record.highest = 0x10000 + sequence
    record.since_ns = m.now_ns


@compiled
def begin_anew(m: Any, number: int, record: Any, other: Any, ssrc: int, sequence: int) -> None:
    """The sender of one leg has begun anew; the other leg brings what is of before."""
    begin(m, number, record, ssrc, sequence)
    record.switches += 1
    other.in_step = 0


@compiled
def begin_leg(leg: Any, ssrc: int, sequence: int) -> None:
    """The leg goes on from here."""
    leg.ssrc = ssrc
    leg.sequence = sequence
    leg.expected += 1
    leg.bad_sequence = NOTHING
    leg.in_step = 1


@compiled
def is_near(record: Any, sequence: int) -> bool:
    """Whether a sequence number is where the record is."""
    step = (sequence - record.highest) & 0xFFFF
    return step < DROPOUT_MAX or step > 0x10000 - DROPOUT_MAX


@compiled
def goes_on(leg: Any, sequence: int) -> bool:
    """Whether a leg's sequence number is ahead of its last one, or a little late. One that is back needs a witness."""
    step = (sequence - leg.sequence) & 0xFFFF
    if 0x8000 <= step <= 0x10000 - MISORDER_MAX:
        return False
    leg.bad_sequence = NOTHING
    if step < 0x8000:
        leg.sequence = sequence
        leg.expected += step
        if step >= DROPOUT_MAX:
            leg.in_step = 1
    return True


@compiled
def is_second(leg: Any, ssrc: int, sequence: int) -> bool:
    """Whether a leg's datagram from elsewhere follows the one before; the next may follow this one."""
    if leg.bad_ssrc == ssrc and leg.bad_sequence == sequence:
        return True
    leg.bad_ssrc = ssrc
    leg.bad_sequence = (sequence + 1) & 0xFFFF
    return False


@compiled
def is_in_step(m: Any, record: Any, leg: Any, sequence: int) -> bool:
    """Whether a leg's sequence numbers are those of the record."""
    if leg.ssrc != record.ssrc:
        return False
    if not leg.in_step and m.now_ns - record.since_ns > STEP_NS and is_near(record, sequence):
        leg.in_step = 1
    return bool(leg.in_step)


@compiled
def follow_leg(m: Any, number: int, record: Any, leg: Any, other: Any, ssrc: int, sequence: int) -> bool:
    """Follow an RTP datagram of a leg; False when it says nothing of where the record is."""
    if leg.sequence < 0:
        begin_leg(leg, ssrc, sequence)
        if record.highest < 0:
            begin(m, number, record, ssrc, sequence)
    elif leg.ssrc != ssrc and ssrc == record.ssrc:  # as the other leg has, before
        begin_leg(leg, ssrc, sequence)
    elif leg.ssrc != ssrc or not goes_on(leg, sequence):
        if not is_second(leg, ssrc, sequence):
            return False
        had_step = leg.in_step and leg.ssrc == record.ssrc
        begin_leg(leg, ssrc, sequence)
        if had_step:
            begin_anew(m, number, record, other, ssrc, sequence)
    if is_in_step(m, record, leg, sequence):
        return True
    if m.now_ns - other.last_ns <= STEP_NS:
        return False
    begin_anew(m, number, record, other, ssrc, sequence)
    leg.in_step = 1
    return True


@compiled
def is_first(m: Any, number: int, record: Any, sequence: int) -> bool:
    """Whether this is the first copy of a sequence number, of which all later ones are then withheld."""
    passed = passed_of(m, number)
    step = (sequence - record.highest) & 0xFFFF
    if 0 < step < 0x8000:
        clear_passed(passed, record.highest + 1, step)
        record.highest += step
        extended = int64(record.highest)
    else:
        back = (0x10000 - step) & 0xFFFF
        if back >= MERGE_WINDOW:
            return False
        extended = record.highest - back
    word = i64_at(passed, (extended >> 6) & (PASSED_WORDS - 1))
    bit = int64(1) << (extended & 63)
    if word.value & bit:
        return False
    count = i64_at(m.journal, 0).value
    store_i64(m.journal + ENTRIES_OFFSET + count * 8, number << JOURNAL_SEQUENCE_BITS | (extended & EXTENDED_MASK))
    store_release_i64(m.journal, count + 1)  # before the bit: a worker may be killed between the two
    word.value = word.value | bit
    return True


@compiled
def lets_through(m: Any, number: int, leg_number: int, payload: int, payload_bytes: int) -> bool:
    """Judge one datagram of a leg of a seamless rule."""
    record = protection_at(m.protections, number)
    if header_bytes(payload, payload_bytes) == 0:
        record.not_rtp += 1
        return leg_number == PRIMARY
    legs = legs_of(m, number)
    leg, other = leg_at(legs, leg_number), leg_at(legs, 1 - leg_number)
    sequence = be16(payload + 2)
    if not follow_leg(m, number, record, leg, other, be32(payload + 8), sequence):
        return False
    return is_first(m, number, record, sequence)


@compiled
def close_open(m: Any, t: Any, entry_index: int) -> None:
    """Send the open batch of an entry, if there is one, so that nothing leaves before it."""
    opened = open_batch_at(m.open_batches, entry_index)
    if opened.window == m.window:
        close_batch(m, t, int64(opened.batch))
        opened.window = 0


@compiled
def hand_on(m: Any, t: Any, entry_index: int, row: Any, datagram: Any, passes: bool) -> int:
    """Let a DATAGRAM through, or withhold it; return how many of its datagrams leave, if only by other rules.

    What a rule sends leaves in order of arrival, whichever leg or entry it came by.
    """
    number, twin = int64(row.record), int64(row.twin)
    count = int64(datagram.datagrams)
    if passes:
        leg_at(legs_of(m, number), int64(row.leg)).firsts += count
        merging = i32_at(m.merging, number)
        if merging.value != entry_index + 1:
            if merging.value:
                close_open(m, t, int64(merging.value) - 1)
            merging.value = entry_index + 1
        if twin != NO_TWIN:
            close_open(m, t, twin)
        add(m, t, entry_index, datagram)
        return count
    protection_at(m.protections, number).withheld += count
    stats_at(m.stats, 0).packets_withheld += count
    if twin == NO_TWIN:
        return 0
    close_open(m, t, entry_index)
    add(m, t, twin, datagram)
    return count


@compiled
def is_silent(m: Any, record: Any, leg: Any, received_ns: int, stall_ns: int) -> bool:
    """Whether nothing came by a leg for longer than `stall_ns` before `received_ns`.

    By both clocks: this worker may have stood still, and the leg's datagrams wait in another ring; or the wall clock,
    which is the kernel's for a ring, was set.
    """
    heard_ns = max(int64(leg.last_ns), int64(m.rings_since_ns), int64(record.begun_ns))
    gap_ns = received_ns - leg.received_ns
    return m.now_ns - heard_ns > stall_ns and (gap_ns > stall_ns or gap_ns < 0)


@compiled
def is_on_duty(m: Any, row: Any, datagram: Any) -> bool:
    """Judge a DATAGRAM of a fail-over rule: whether its leg is the one that is relayed."""
    number, stall_ns, received_ns = int64(row.record), int64(row.stall_ns), int64(datagram.received_ns)
    record = protection_at(m.protections, number)
    primary, secondary = leg_at(legs_of(m, number), PRIMARY), leg_at(legs_of(m, number), SECONDARY)
    if row.leg == PRIMARY:
        if is_silent(m, record, primary, received_ns, stall_ns):
            record.since_ns = m.now_ns
        if record.active == SECONDARY and (
            m.now_ns - record.since_ns >= stall_ns or is_silent(m, record, secondary, received_ns, stall_ns)
        ):
            record.active = PRIMARY
            record.switches += 1
        return bool(record.active == PRIMARY)
    if record.active == PRIMARY:
        if is_silent(m, record, secondary, received_ns, stall_ns):
            record.begun_ns = m.now_ns  # both were silent: the primary may still be the first to be back
        elif is_silent(m, record, primary, received_ns, stall_ns):
            record.active = SECONDARY
            record.switches += 1
    return bool(record.active == SECONDARY)


@compiled
def merge(m: Any, t: Any, entry_index: int, row: Any, datagram: Any) -> int:
    """Judge each datagram of a DATAGRAM, and hand on what goes the same way in one piece; return how many leave."""
    number, leg_number = int64(row.record), int64(row.leg)
    left_bytes, segment_bytes = int64(datagram.payload_bytes), int64(datagram.segment_bytes)
    payload = int64(datagram.payload)
    run, run_bytes, run_passes = int64(0), int64(0), False
    leaving = int64(0)
    for _ in range(int64(datagram.datagrams)):
        taken = min(segment_bytes, left_bytes)
        passes = lets_through(m, number, leg_number, payload, taken)
        if run and passes != run_passes:
            leaving += hand_on_run(m, t, entry_index, row, datagram, payload, run, run_bytes, run_passes)
            run = run_bytes = int64(0)
        run_passes = passes
        run += 1
        run_bytes += taken
        payload += taken
        left_bytes -= taken
    return leaving + hand_on_run(m, t, entry_index, row, datagram, payload, run, run_bytes, run_passes)


@compiled
def hand_on_run(
    m: Any, t: Any, entry_index: int, row: Any, datagram: Any, end: int, run: int, run_bytes: int, passes: bool
) -> int:
    """Hand on `run` datagrams of a super-frame, which end at address `end`. Changes the DATAGRAM."""
    datagram.datagrams = run
    datagram.payload_bytes = run_bytes
    datagram.payload = end - run_bytes
    if run == 1:
        datagram.segment_bytes = run_bytes
    leaving = hand_on(m, t, entry_index, row, datagram, passes)
    return int64(leaving)


@compiled
def relay_protected(m: Any, t: Any, entry_index: int, datagram: Any) -> int:
    """Take a matched DATAGRAM of a protected entry further, or withhold it; return how many of its datagrams leave."""
    row = protected_at(t.protected, int64(entry_at(t.entries, entry_index).protection) - 1)
    received_ns, count = int64(datagram.received_ns), int64(datagram.datagrams)
    if row.mode == FAILOVER:
        passes = is_on_duty(m, row, datagram)
        leaving = int64(hand_on(m, t, entry_index, row, datagram, passes))
    else:
        # A drain between here and the last of these would strike from the journal what it has not sent.
        if i64_at(m.journal, 0).value + count > JOURNAL_ENTRIES or m.batch_count + 2 * count > BATCHES_MAX:
            drain(m, t)
        leaving = int64(merge(m, t, entry_index, row, datagram))
    leg = leg_at(legs_of(m, int64(row.record)), int64(row.leg))
    leg.packets += count
    leg.last_ns = m.now_ns
    leg.received_ns = received_ns
    return leaving


def take_back(protections: Any, journal: Any) -> None:
    """What a killed worker let through, and had not handed to the kernel, has not been let through.

    Arrays of PROTECTION, and the JOURNAL beside it, which a worker may have filled with anything.
    """
    count = min(max(int(journal["count"]), 0), JOURNAL_ENTRIES)
    entries = journal["entries"][:count].astype(np.uint64)
    numbers = (entries >> np.uint64(JOURNAL_SEQUENCE_BITS)).astype(np.int64)
    extended = (entries & np.uint64(EXTENDED_MASK)).astype(np.int64)
    known = numbers < PROTECTIONS_MAX
    numbers, extended = numbers[known], extended[known]
    bits = np.left_shift(np.int64(1), extended & 63)
    place = (numbers, (extended >> 6) & (PASSED_WORDS - 1))
    np.bitwise_and.at(protections["passed"], place, ~bits)
    journal["count"] = 0


def empty_record() -> Any:
    """A PROTECTION of which nothing is known yet."""
    record = np.zeros(1, layout.PROTECTION)
    record["highest"] = NOTHING
    record["legs"]["sequence"] = record["legs"]["bad_sequence"] = NOTHING
    return record[0]
