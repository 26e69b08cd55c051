"""MPEG-TS: what the headers of a transport stream's packets tell. ISO/IEC 13818-1 section 2.4.3, ETSI TR 101 290 5.2.

Pure: whole packets in memory, a STREAM record and its PID records in, counters out. A packet is called a cell here, as
"packet" is taken. Only headers and adaptation fields are read: five bytes of most cells, twelve where there is a PCR.
"""

from typing import Any

from logging_shm.atomics import int64, load_u8, load_u32
from logging_shm.jit import compiled
from relay.dataplane.layout import PIDS_MAX
from relay.dataplane.memory import pid_at
from relay.dataplane.parse import be32

CELL_BYTES = 188
SYNC_BYTE = 0x47
PID_PAT = 0x0000
PID_NULL = 0x1FFF
# A header as it is loaded, little-endian.
TRANSPORT_ERROR = 0x80 << 8
UNIT_START = 0x40 << 8
CONTINUITY_SHIFT = 24
CONTINUITY_ONE = 1 << CONTINUITY_SHIFT
CONTINUITY_MASK = 0xF << CONTINUITY_SHIFT
NO_HEADER = -1
HAS_PAYLOAD = 0x10 << CONTINUITY_SHIFT
HAS_ADAPTATION = 0x20 << CONTINUITY_SHIFT
# The byte behind an adaptation field's length
DISCONTINUITY = 0x80
HAS_PCR = 0x10
PCR_ADAPTATION_BYTES = 7  # flags and PCR

CONTINUITY_UNKNOWN = -1
CONTINUITY_REPEATED = 16  # the last cell came twice: that is allowed once
PID_PROBES_MAX = 16
IN_SYNC = 5  # sync bytes in a row, TR 101 290 indicator 1.1
SYNC_LOST = -2  # that many corrupted ones in a row
FORGOTTEN_AFTER = -700  # then the stream carries something else: a hundred datagrams of seven
RECOGNISED_AFTER = 10  # cells
PCR_GAP_NS = 100_000_000  # indicator 2.3a
PCR_HZ = 27_000_000
PCR_STEP_MAX = PCR_HZ // 10  # indicator 2.3b: 100 ms
PCR_MODULUS = (1 << 33) * 300
PAT_GAP_NS = 500_000_000  # indicator 1.3
RATE_WINDOW = PCR_HZ // 2  # the least distance of two PCRs that the bit rate is measured between


@compiled
def holds_cells(payload: int, payload_bytes: int) -> bool:
    """Whether memory holds whole cells and nothing else."""
    if payload_bytes == 0 or payload_bytes % CELL_BYTES:
        return False
    for at in range(0, payload_bytes, CELL_BYTES):
        if load_u8(payload + at) != SYNC_BYTE:
            return False
    return True


@compiled
def recognise(stream: Any, payload: int, payload_bytes: int) -> bool:
    """Look for cells in a datagram of a STREAM that carries something else; whether enough have come."""
    if not holds_cells(payload, payload_bytes):
        stream.cell_run = 0
        return False
    stream.cell_run += payload_bytes // CELL_BYTES
    if stream.cell_run < RECOGNISED_AFTER:
        return False
    stream.sync_run = IN_SYNC
    return True


@compiled
def follow(stream: Any, pids: int, payload: int, payload_bytes: int, received_ns: int) -> None:
    """Take a datagram's cells into a STREAM that carries them; `pids` is the address of its PID records.

    Most cells differ from the one before by its counter alone: those are counted in a register.
    """
    cells = payload_bytes // CELL_BYTES
    if cells * CELL_BYTES != payload_bytes:
        stream.malformed += 1
    place, former, more = int64(0), int64(NO_HEADER), int64(0)
    for number in range(cells):
        cell = payload + number * CELL_BYTES
        header = int64(load_u32(cell))
        next_header = former & ~CONTINUITY_MASK | (former + CONTINUITY_ONE) & CONTINUITY_MASK
        if header & ~UNIT_START == next_header:
            former = next_header
            more += 1
            continue
        if more:
            count_cells(pids, place, former, more)
            more = int64(0)
        place = take_cell(stream, pids, cell, header, stream.cells + number, received_ns)
        former = int64(NO_HEADER)
        if place >= 0 and header & (HAS_PAYLOAD | HAS_ADAPTATION):
            former = header & ~(UNIT_START | HAS_ADAPTATION) | HAS_PAYLOAD
    if more:
        count_cells(pids, place, former, more)
    stream.cells += cells


@compiled
def count_cells(pids: int, place: int, header: int, more: int) -> None:
    """Count cells of one PID that followed each other, the last with this header."""
    record = pid_at(pids, place)
    record.cells += more
    record.continuity = header >> CONTINUITY_SHIFT & 0xF


@compiled
def take_cell(stream: Any, pids: int, cell: int, header: int, position: int, received_ns: int) -> int:
    """Take the cell at `position` of the stream; return the place of its PID's record, -1 where it has none."""
    if (header & 0xFF != SYNC_BYTE or stream.sync_run != IN_SYNC) and not follow_sync(stream, header):
        return -1
    if header & TRANSPORT_ERROR:  # nothing else in it can be trusted
        stream.transport_errors += 1
        return -1
    pid = (header & 0x1F00) | (header >> 16 & 0xFF)
    if pid == PID_NULL:
        return -1
    if pid == PID_PAT:
        follow_pat(stream, received_ns)
    place = find_pid(stream, pids, pid)
    if place < 0:
        stream.cells_untracked += 1
        return -1
    record = pid_at(pids, place)
    record.cells += 1
    follow_continuity(stream, record, cell, header)
    if header & HAS_ADAPTATION and load_u8(cell + 4) >= PCR_ADAPTATION_BYTES and load_u8(cell + 5) & HAS_PCR:
        follow_pcr(stream, record, cell, position, received_ns)
    return place


@compiled
def follow_sync(stream: Any, header: int) -> bool:
    """Take the sync byte of a cell where not all is well; whether the cell can be read."""
    is_right = header & 0xFF == SYNC_BYTE
    run = int64(stream.sync_run)
    if is_right:
        # One corrupted byte loses nothing; after more of them it takes IN_SYNC sound ones.
        stream.sync_run = IN_SYNC if run == -1 else max(run, 0) + 1
        return bool(stream.sync_run == IN_SYNC)
    stream.sync_byte_errors += 1
    if run == IN_SYNC:
        stream.sync_run = -1
    elif run == -1:
        stream.sync_run = SYNC_LOST
        stream.sync_losses += 1
    else:
        stream.sync_run = min(run, SYNC_LOST) - 1
    return False


@compiled
def find_pid(stream: Any, pids: int, pid: int) -> int:
    """The place of a PID's record, a new one if need be; -1 when there is no room."""
    place = pid & (PIDS_MAX - 1)
    for _ in range(PID_PROBES_MAX):
        record = pid_at(pids, place)
        if record.pid == pid + 1:
            return place
        if record.pid == 0:
            record.continuity = CONTINUITY_UNKNOWN
            record.pid = pid + 1
            stream.pids += 1
            return place
        place = (place + 1) & (PIDS_MAX - 1)
    return -1


@compiled
def follow_continuity(stream: Any, record: Any, cell: int, header: int) -> None:
    """Take a cell's continuity counter: one more with payload, the same without. Neither: reserved, to be ignored."""
    continuity = header >> CONTINUITY_SHIFT & 0xF
    if header & HAS_PAYLOAD:
        if (record.continuity + 1) & 0xF == continuity:
            record.continuity = continuity
        else:
            take_unexpected(stream, record, cell, header)
    elif header & HAS_ADAPTATION and (record.continuity < 0 or record.continuity & 0xF != continuity):
        take_unexpected(stream, record, cell, header)


@compiled
def take_unexpected(stream: Any, record: Any, cell: int, header: int) -> None:
    """Take a continuity counter that is not the expected one. ISO/IEC 13818-1 section 2.4.3.3, TR 101 290 1.4."""
    former = int64(record.continuity)
    continuity = header >> CONTINUITY_SHIFT & 0xF
    record.continuity = continuity
    if former == CONTINUITY_UNKNOWN:
        return
    if header & HAS_ADAPTATION and load_u8(cell + 4) and load_u8(cell + 5) & DISCONTINUITY:
        return
    if header & HAS_PAYLOAD and continuity == former:
        record.continuity = continuity | CONTINUITY_REPEATED
        return
    record.continuity_errors += 1
    stream.continuity_errors += 1


@compiled
def follow_pat(stream: Any, received_ns: int) -> None:
    """A cell of the program association table has come."""
    if stream.pat_received_ns and received_ns - stream.pat_received_ns > PAT_GAP_NS:
        stream.pat_gaps += 1
    stream.pat_received_ns = received_ns


@compiled
def pcr_of(cell: int) -> int:
    """The program clock reference of a cell that has one: 27 MHz, 33 bits of 90 kHz times 300 plus 9 bits."""
    low = int64(load_u8(cell + 10))
    base = be32(cell + 6) << 1 | low >> 7
    return base * 300 + ((low & 1) << 8 | int64(load_u8(cell + 11)))


@compiled
def follow_pcr(stream: Any, record: Any, cell: int, position: int, received_ns: int) -> None:
    """Take the PCR of a cell, the `position`th of its stream. TR 101 290 2.3a, by arrival, and 2.3b."""
    pcr = pcr_of(cell)
    announced = load_u8(cell + 5) & DISCONTINUITY != 0
    is_jump = False
    if record.pcr:
        step = pcr - (record.pcr - 1)
        if step < 0:
            step += PCR_MODULUS
        is_jump = step > PCR_STEP_MAX
        if received_ns - record.pcr_received_ns > PCR_GAP_NS:
            stream.pcr_gaps += 1
        if is_jump and not announced:
            stream.pcr_discontinuities += 1
    record.pcr = pcr + 1
    record.pcr_received_ns = received_ns
    if stream.rate_pid == 0:
        stream.rate_pid = record.pid
        is_jump = True
    if stream.rate_pid == record.pid:
        measure_rate(stream, pcr, position, is_jump or announced)


@compiled
def measure_rate(stream: Any, pcr: int, position: int, anew: bool) -> None:
    """The stream's bit rate between two PCRs of one PID. ISO/IEC 13818-1 equation 2-5."""
    elapsed = pcr - stream.rate_pcr
    if elapsed < 0:
        elapsed += PCR_MODULUS
    if not anew:
        if elapsed < RATE_WINDOW:
            return
        stream.bits_per_second = (position - stream.rate_cells) * CELL_BYTES * 8 * PCR_HZ // elapsed
    stream.rate_pcr = pcr
    stream.rate_cells = position
