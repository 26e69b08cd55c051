"""Lines: a batch of records into bytes for one sink, in compiled code that releases the GIL.

One function a format: text, JSON, syslog (RFC 5424), and journald's native protocol. All take the same arguments, fill
`out`, and note the end of each message in `ends`. What a message says comes from render.py's steps; every byte
that comes from a segment is checked here: nothing can end a line, move a cursor or forge a field.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from logging_shm.append import (
    JSON,
    PLAIN,
    STRUCTURED_DATA,
    constant,
    constants,
    put,
    put_address,
    put_duration,
    put_field,
    put_hex,
    put_name,
    put_number,
    put_printable,
    put_real,
    put_time,
)
from logging_shm.atomics import int64, load_f64, load_i64, load_u8, load_u16, load_u32
from logging_shm.facility import Facility, Severity
from logging_shm.layout import FORMATS_MAX, MESSAGE_BYTES_MAX, PAIR, RECORD, RECORD_BYTES
from logging_shm.render import KINDS, steps

LINE_BYTES_MAX = 4096  # room that a line may need: every byte of a record escaped to five, and what frames it
STEPS_MAX = 48  # a format of 128 bytes has no more
LITERAL_BYTES = 1024  # 128 bytes, each escaped

STEP_KINDS = ("end", "literal", "pair", *KINDS)
END, LITERAL, PAIR_VALUE, DECIMAL, REAL, ADDRESS, PORT, DURATION, HEX = range(len(STEP_KINDS))

FORMAT = RECORD["format"]
SEVERITY = RECORD["severity"]
FACILITY = RECORD["facility"]
LENGTH = RECORD["message_length"]
PAIR_COUNT = RECORD["pair_count"]
CORE = RECORD["core"]
TIMESTAMP = RECORD["timestamp_ns"]
SEQUENCE = RECORD["sequence"]
PROCESS = RECORD["process"]
THREAD = RECORD["thread"]
MESSAGE = RECORD["message"]
PAIRS = RECORD["pairs"]
PAIR_BYTES = PAIR.bytes
KEY_LENGTH = PAIR["key_length"]
KEY = PAIR["key"]
KEY_BYTES = PAIR.fields["key"].bytes
VALUE_LENGTH = PAIR["value_length"]
VALUE = PAIR["value"]
VALUE_BYTES = PAIR.fields["value"].bytes

# How a pair's key is spelled.
AS_IT_IS, SD_NAME, UPPER = range(3)

SYSLOG_FACILITY_SHIFT = 8
SEVERITY_NAMES = constants(severity.name for severity in Severity)
FACILITY_NAMES = constants(facility.name for facility in Facility)
COLOURS = constants(f"\033[{code}m" for code in ("1;41", "1;41", "1;31", "31", "33", "36", "0", "2"))
UNCOLOURED = constant("\033[0m")
NOTHING = constant("")
TEXT_CORE, TEXT_PID, TEXT_TID, TEXT_SEQUENCE = map(constant, (" core=", " pid=", " tid=", " seq="))
JSON_TIME = constant('{"time":"')
JSON_SEVERITY = constant('","severity":"')
JSON_FACILITY = constant('","facility":"')
JSON_MESSAGE = constant('","message":"')
JSON_CORE = constant('","core":')
JSON_PID = constant(',"pid":')
JSON_TID = constant(',"tid":')
JSON_SEQUENCE = constant(',"sequence":')
JSON_TIMESTAMP = constant(',"timestamp_ns":')
JSON_PAIRS = constant(',"pairs":{')
JSON_END = constant("}}\n")
SYSLOG_ID = constant(' [mcr@32473 core="')
SYSLOG_SEQUENCE = constant('" seq="')
SYSLOG_TID = constant('" tid="')
SYSLOG_END = constant('"] ')
JOURNAL_MESSAGE = constant("MESSAGE=")
JOURNAL_PRIORITY = constant("\nPRIORITY=")
JOURNAL_IDENTIFIER = constant("\nSYSLOG_IDENTIFIER=mcr\nMCR_FACILITY=")
JOURNAL_CORE = constant("\nMCR_CORE=")
JOURNAL_PID = constant("\nMCR_PID=")
JOURNAL_TID = constant("\nMCR_TID=")
JOURNAL_SEQUENCE = constant("\nMCR_SEQUENCE=")
JOURNAL_TIMESTAMP = constant("\nMCR_TIMESTAMP_NS=")
JOURNAL_PAIR = constant("\nMCR_")
UNREGISTERED, IS_NOT_REGISTERED = map(constant, ("(format ", " is not registered)"))


class Formats:
    """The formats of every ring of a batch, taken apart: arrays for compiled code."""

    def __init__(self, rings: int) -> None:
        self.steps = np.zeros((rings, FORMATS_MAX, STEPS_MAX, 3), np.int32)  # kind, argument or start, length
        self.literals = np.zeros((rings, FORMATS_MAX, LITERAL_BYTES), np.uint8)

    def load(self, ring: int, number: int, template: str | None) -> None:
        """Take a ring's format apart; what is too long for the table is left out."""
        at, length = 0, 0
        if template is None:
            template = f"(format {number} is not registered)"
        for kind, text, argument in steps(template):
            if at == STEPS_MAX - 1 or length + len(text) > LITERAL_BYTES:
                break
            self.steps[ring, number, at] = (STEP_KINDS.index(kind), length if text else argument, len(text))
            self.literals[ring, number, length : length + len(text)] = np.frombuffer(text, np.uint8)
            length += len(text)
            at += 1
        self.steps[ring, number, at] = 0


class Batch(NamedTuple):
    """What a batch holds, for compiled code."""

    records: Any  # u1[count, 256]
    origins: Any  # i4[count]: index of the ring
    steps: Any  # i4[rings, FORMATS_MAX, STEPS_MAX, 3]
    literals: Any  # u1[rings, FORMATS_MAX, LITERAL_BYTES]
    printable: Any  # u1[UNICODE_SHOWN]


class Frame(NamedTuple):
    """What a sink wants, for compiled code."""

    levels: Any  # i1[facilities]: the least grave severity that is shown, -1 for none
    realtime_offset_ns: int
    timestamps: bool
    fields: bool
    colours: bool
    host: Any  # u1[…], for syslog: host and application, each followed by a space
    syslog_facility: int  # RFC 5424's code


@njit(cache=True, nogil=True)
def put_literal(out: Any, at: int, literals: Any, start: int, length: int, quoting: int) -> int:
    """Append a part of a format, which is printable already."""
    for i in range(start, start + length):
        byte = literals[i]
        if quoting != PLAIN and (byte in (34, 92) or (byte == 93 and quoting == STRUCTURED_DATA)):
            out[at] = 92
            at += 1
        out[at] = byte
        at += 1
    return at


@njit(cache=True, nogil=True)
def find_pair(record: int, literals: Any, start: int, length: int) -> int:
    """The address of the last pair with a key, 0 when there is none."""
    found = 0
    for index in range(load_u8(record + PAIR_COUNT)):
        pair = record + PAIRS + index * PAIR_BYTES
        same = load_u8(pair + KEY_LENGTH) == length and length <= KEY_BYTES
        if same:
            for i in range(length):
                same = same and load_u8(pair + KEY + i) == literals[start + i]
        if same:
            found = pair
    return found


@njit(cache=True, nogil=True)
def put_message(out: Any, at: int, batch: Any, index: int, quoting: int) -> int:
    """Append a record's message: its text, or its arguments as their format says."""
    record = batch.records.ctypes.data + index * RECORD_BYTES
    number = int64(load_u16(record + FORMAT))
    length = min(int64(load_u8(record + LENGTH)), MESSAGE_BYTES_MAX)
    if number == 0:
        return put_printable(out, at, record + MESSAGE, length, quoting, batch.printable)
    if number >= FORMATS_MAX:
        at = put(out, at, UNREGISTERED)
        at = put_number(out, at, number)
        return put(out, at, IS_NOT_REGISTERED)
    count = length // 8
    literals = batch.literals[batch.origins[index], number]
    steps_here = batch.steps[batch.origins[index], number]
    for step in range(STEPS_MAX):
        kind = steps_here[step, 0]
        argument = steps_here[step, 1]
        if kind == END:
            break
        if kind == LITERAL:
            at = put_literal(out, at, literals, argument, steps_here[step, 2], quoting)
        elif kind == PAIR_VALUE:
            pair = find_pair(record, literals, argument, steps_here[step, 2])
            if pair:
                size = min(int64(load_u8(pair + VALUE_LENGTH)), VALUE_BYTES)
                at = put_printable(out, at, pair + VALUE, size, quoting, batch.printable)
        elif argument < count:
            at = put_argument(out, at, kind, record + MESSAGE + 8 * argument)
    return at


@njit(cache=True, nogil=True)
def put_argument(out: Any, at: int, kind: int, address: int) -> int:
    """Append one typed argument."""
    value = int64(load_i64(address))
    if kind == DECIMAL:
        return put_number(out, at, value)
    if kind == ADDRESS:
        return put_address(out, at, value)
    if kind == PORT:
        return put_number(out, at, value & 0xFFFF)
    if kind == REAL:
        return put_real(out, at, load_f64(address))
    if kind == DURATION:
        return put_duration(out, at, value)
    out[at] = 48
    out[at + 1] = 120
    digits = 1
    while digits < 16 and (value >> (4 * digits)) & ((1 << (64 - 4 * digits)) - 1):
        digits += 1
    return put_hex(out, at + 2, value, digits)


@njit(cache=True, nogil=True)
def put_key(out: Any, at: int, pair: int, spelling: int, quoting: int, printable: Any) -> int:
    """Append a pair's key: as it is, as an SD-NAME, or as journald's capital letters."""
    length = min(int64(load_u8(pair + KEY_LENGTH)), KEY_BYTES)
    if spelling == AS_IT_IS:
        return put_printable(out, at, pair + KEY, length, quoting, printable)
    if length == 0:
        out[at] = 95
        return at + 1
    for i in range(length):
        byte = int64(load_u8(pair + KEY + i))
        is_letter = 65 <= byte <= 90 or 97 <= byte <= 122
        if spelling == UPPER and 97 <= byte <= 122:
            byte -= 32
        out[at + i] = byte if is_letter or 48 <= byte <= 57 else 95
    return at + length


@njit(cache=True, nogil=True)
def put_value(out: Any, at: int, pair: int, quoting: int, printable: Any) -> int:
    """Append a pair's value."""
    length = min(int64(load_u8(pair + VALUE_LENGTH)), VALUE_BYTES)
    return put_printable(out, at, pair + VALUE, length, quoting, printable)


@njit(cache=True, nogil=True)
def is_shown_here(record: int, frame: Any) -> bool:
    """Whether a sink wants this record."""
    return load_u8(record + SEVERITY) <= frame.levels[load_u8(record + FACILITY)]


@njit(cache=True, nogil=True)
def format_text(batch: Any, first: int, frame: Any, out: Any, ends: Any) -> Any:
    """`[Info] [Ingress] message`: records from `first` on; return (records done, lines, bytes), as all formats do."""
    at, lines, index = 0, 0, first
    room = len(out) - LINE_BYTES_MAX
    while index < len(batch.records) and at < room:
        record = batch.records.ctypes.data + index * RECORD_BYTES
        index += 1
        if not is_shown_here(record, frame):
            continue
        if frame.colours:
            at = put_name(out, at, COLOURS[load_u8(record + SEVERITY)])
        if frame.timestamps:
            at = put_time(out, at, int64(load_i64(record + TIMESTAMP)) + frame.realtime_offset_ns)
            out[at] = 32
            at += 1
        out[at] = 91
        at = put_name(out, at + 1, SEVERITY_NAMES[load_u8(record + SEVERITY)])
        out[at] = 93
        out[at + 1] = 32
        out[at + 2] = 91
        at = put_name(out, at + 3, FACILITY_NAMES[load_u8(record + FACILITY)])
        out[at] = 93
        out[at + 1] = 32
        at = put_message(out, at + 2, batch, index - 1, PLAIN)
        if frame.fields:
            at = put_field(out, at, TEXT_CORE, load_u8(record + CORE), TEXT_PID)
            at = put_field(out, at, NOTHING, load_u32(record + PROCESS), TEXT_TID)
            at = put_field(out, at, NOTHING, load_u32(record + THREAD), TEXT_SEQUENCE)
            at = put_number(out, at, load_i64(record + SEQUENCE))
            at = put_text_pairs(out, at, record, batch.printable)
        if frame.colours:
            at = put(out, at, UNCOLOURED)
        out[at] = 10
        at += 1
        ends[lines] = at
        lines += 1
    return index, lines, at


@njit(cache=True, nogil=True)
def put_text_pairs(out: Any, at: int, record: int, printable: Any) -> int:
    """Append ` key="value"` for each pair."""
    for i in range(load_u8(record + PAIR_COUNT)):
        pair = record + PAIRS + i * PAIR_BYTES
        out[at] = 32
        at = put_key(out, at + 1, pair, AS_IT_IS, PLAIN, printable)
        out[at] = 61
        out[at + 1] = 34
        at = put_value(out, at + 2, pair, JSON, printable)
        out[at] = 34
        at += 1
    return at


@njit(cache=True, nogil=True)
def format_json(batch: Any, first: int, frame: Any, out: Any, ends: Any) -> Any:
    """One JSON object a line."""
    at, lines, index = 0, 0, first
    room = len(out) - LINE_BYTES_MAX
    while index < len(batch.records) and at < room:
        record = batch.records.ctypes.data + index * RECORD_BYTES
        index += 1
        if not is_shown_here(record, frame):
            continue
        timestamp_ns = int64(load_i64(record + TIMESTAMP))
        at = put_time(out, put(out, at, JSON_TIME), timestamp_ns + frame.realtime_offset_ns)
        at = put_name(out, put(out, at, JSON_SEVERITY), SEVERITY_NAMES[load_u8(record + SEVERITY)])
        at = put_name(out, put(out, at, JSON_FACILITY), FACILITY_NAMES[load_u8(record + FACILITY)])
        at = put_message(out, put(out, at, JSON_MESSAGE), batch, index - 1, JSON)
        at = put_field(out, at, JSON_CORE, load_u8(record + CORE), JSON_PID)
        at = put_field(out, at, NOTHING, load_u32(record + PROCESS), JSON_TID)
        at = put_field(out, at, NOTHING, load_u32(record + THREAD), JSON_SEQUENCE)
        at = put_field(out, at, NOTHING, load_i64(record + SEQUENCE), JSON_TIMESTAMP)
        at = put_field(out, at, NOTHING, timestamp_ns, JSON_PAIRS)
        for i in range(load_u8(record + PAIR_COUNT)):
            pair = record + PAIRS + i * PAIR_BYTES
            if i:
                out[at] = 44
                at += 1
            out[at] = 34
            at = put_key(out, at + 1, pair, AS_IT_IS, JSON, batch.printable)
            out[at] = 34
            out[at + 1] = 58
            out[at + 2] = 34
            at = put_value(out, at + 3, pair, JSON, batch.printable)
            out[at] = 34
            at += 1
        at = put(out, at, JSON_END)
        ends[lines] = at
        lines += 1
    return index, lines, at


@njit(cache=True, nogil=True)
def format_syslog(batch: Any, first: int, frame: Any, out: Any, ends: Any) -> Any:
    """RFC 5424 messages, without framing: PRI, time, host, application, pid, the facility as MSGID, structured data."""
    at, lines, index = 0, 0, first
    room = len(out) - LINE_BYTES_MAX
    while index < len(batch.records) and at < room:
        record = batch.records.ctypes.data + index * RECORD_BYTES
        index += 1
        if not is_shown_here(record, frame):
            continue
        out[at] = 60
        at = put_number(out, at + 1, frame.syslog_facility * SYSLOG_FACILITY_SHIFT + load_u8(record + SEVERITY))
        out[at] = 62
        out[at + 1] = 49
        out[at + 2] = 32
        at = put_time(out, at + 3, int64(load_i64(record + TIMESTAMP)) + frame.realtime_offset_ns)
        out[at] = 32
        at = put(out, at + 1, frame.host)
        at = put_number(out, at, load_u32(record + PROCESS))
        out[at] = 32
        at = put_name(out, at + 1, FACILITY_NAMES[load_u8(record + FACILITY)])
        at = put_field(out, at, SYSLOG_ID, load_u8(record + CORE), SYSLOG_SEQUENCE)
        at = put_field(out, at, NOTHING, load_i64(record + SEQUENCE), SYSLOG_TID)
        at = put_number(out, at, load_u32(record + THREAD))
        for i in range(load_u8(record + PAIR_COUNT)):
            pair = record + PAIRS + i * PAIR_BYTES
            out[at] = 34
            out[at + 1] = 32
            at = put_key(out, at + 2, pair, SD_NAME, PLAIN, batch.printable)
            out[at] = 61
            out[at + 1] = 34
            at = put_value(out, at + 2, pair, STRUCTURED_DATA, batch.printable)
        at = put_message(out, put(out, at, SYSLOG_END), batch, index - 1, PLAIN)
        ends[lines] = at
        lines += 1
    return index, lines, at


@njit(cache=True, nogil=True)
def format_journal(batch: Any, first: int, frame: Any, out: Any, ends: Any) -> Any:
    """Datagrams of journald's native protocol: a field a line."""
    at, lines, index = 0, 0, first
    room = len(out) - LINE_BYTES_MAX
    while index < len(batch.records) and at < room:
        record = batch.records.ctypes.data + index * RECORD_BYTES
        index += 1
        if not is_shown_here(record, frame):
            continue
        at = put_message(out, put(out, at, JOURNAL_MESSAGE), batch, index - 1, PLAIN)
        at = put_field(out, at, JOURNAL_PRIORITY, load_u8(record + SEVERITY), JOURNAL_IDENTIFIER)
        at = put_name(out, at, FACILITY_NAMES[load_u8(record + FACILITY)])
        at = put_field(out, at, JOURNAL_CORE, load_u8(record + CORE), JOURNAL_PID)
        at = put_field(out, at, NOTHING, load_u32(record + PROCESS), JOURNAL_TID)
        at = put_field(out, at, NOTHING, load_u32(record + THREAD), JOURNAL_SEQUENCE)
        at = put_field(out, at, NOTHING, load_i64(record + SEQUENCE), JOURNAL_TIMESTAMP)
        at = put_number(out, at, load_i64(record + TIMESTAMP))
        for i in range(load_u8(record + PAIR_COUNT)):
            pair = record + PAIRS + i * PAIR_BYTES
            at = put_key(out, put(out, at, JOURNAL_PAIR), pair, UPPER, PLAIN, batch.printable)
            out[at] = 61
            at = put_value(out, at + 1, pair, PLAIN, batch.printable)
        out[at] = 10
        at += 1
        ends[lines] = at
        lines += 1
    return index, lines, at


FORMATTERS = {"text": format_text, "json": format_json, "syslog": format_syslog, "journal": format_journal}
