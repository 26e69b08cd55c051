"""Lines: a batch of records into bytes for one sink, in compiled code that releases the GIL.

One function a format: text, JSON, syslog (RFC 5424), and journald's native protocol. All take the same arguments, fill
`out` (u1[…]), and note the end of each message in `ends` (i8[…]). What a message says comes from render.py's steps;
every byte that comes from a segment is checked here: nothing can end a line, move a cursor or forge a field.
"""

from typing import Any, NamedTuple

import numpy as np

from logging_shm.append import (
    JSON,
    PLAIN,
    STRUCTURED_DATA,
    WORD_BYTES,
    constant,
    constants,
    put,
    put_address,
    put_duration,
    put_endpoint,
    put_field,
    put_hex,
    put_number,
    put_printable,
    put_real,
    put_time,
)
from logging_shm.atomics import int64, load_f64, load_i64, load_u8, load_u16, load_u32, store_i64, store_u8
from logging_shm.facility import Facility, Severity
from logging_shm.jit import compiled
from logging_shm.layout import (
    ARGUMENTS_MAX,
    CORE_NONE,
    FORMAT_BYTES_MAX,
    FORMATS_MAX,
    MESSAGE_BYTES_MAX,
    PAIR,
    RECORD,
    RECORD_BYTES,
    Field,
    Layout,
)
from logging_shm.render import ENDPOINT, ENDPOINT_ARGUMENTS, KINDS, steps

# Room that a line may need, and copies of whole words behind it. The longest is a JSON message of format "{a}{a}…",
# 42 times a value of 20 bytes that are escaped to five each, with two such pairs and what frames it: 4653.
LINE_BYTES_MAX = 8192
STEPS_MAX = 1 + FORMAT_BYTES_MAX // 2  # "x{a}x{a}…" has a step for every two bytes; then the end
LITERAL_BYTES = 1024  # 128 bytes, each escaped
# A step's argument is that number, or where a text begins.
STEP = Layout(8, kind=Field(0, "H"), argument=Field(2, "H"), length=Field(4, "H"))
STEP_KIND, STEP_ARGUMENT, STEP_LENGTH = STEP["kind"], STEP["argument"], STEP["length"]
STEP_BYTES = STEP.bytes
NEEDS_QUOTING = b'"\\]'

STEP_KINDS = ("end", "plain", "literal", "pair", *KINDS, ENDPOINT)
END, PLAIN_LITERAL, LITERAL, PAIR_VALUE, DECIMAL, REAL, ADDRESS, PORT, DURATION, HEX, ADDRESS_AND_PORT = range(
    len(STEP_KINDS)
)

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
NULL = constant("null")
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
SYSLOG_ID = constant(' [mcr@32473 tid="')
SYSLOG_SEQUENCE = constant('" seq="')
SYSLOG_CORE = constant('" core="')
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
        self.steps = np.zeros((rings, FORMATS_MAX, STEPS_MAX, STEP_BYTES), np.uint8)
        self.literals = np.zeros((rings, FORMATS_MAX, LITERAL_BYTES), np.uint8)

    def load(self, ring: int, number: int, template: str | None) -> None:
        """Take a ring's format apart; what is too long for the table is left out."""
        at, length = 0, 0
        if template is None:
            template = f"(format {number} is not registered)"
        for kind, text, argument in steps(template):
            if at == STEPS_MAX - 1 or length + len(text) > LITERAL_BYTES - WORD_BYTES:
                break
            is_plain = kind == "literal" and not set(text) & set(NEEDS_QUOTING)
            number_of_kind = STEP_KINDS.index("plain" if is_plain else kind)
            step = self.steps[ring, number, at]
            STEP.set(step, "kind", number_of_kind)
            STEP.set(step, "argument", length if text else argument)
            STEP.set(step, "length", len(text))
            self.literals[ring, number, length : length + len(text)] = np.frombuffer(text, np.uint8)
            length += len(text)
            at += 1
        self.steps[ring, number, at] = 0


class Batch(NamedTuple):
    """What a batch holds, for compiled code."""

    records: Any  # u1[count, 256]
    origins: Any  # i4[count]: index of the ring
    steps: Any  # u1[rings, FORMATS_MAX, STEPS_MAX, 8]: STEP
    literals: Any  # u1[rings, FORMATS_MAX, LITERAL_BYTES]
    printable: Any  # u1[UNICODE_SHOWN]


class Frame(NamedTuple):
    """What a sink wants, for compiled code."""

    levels: Any  # i1[facilities]: the least grave severity that is shown, -1 for none
    realtime_offset_ns: int
    timestamps: bool
    fields: bool
    colours: bool
    host: Any  # i8[…], for syslog: host and application as a constant, each followed by a space
    syslog_facility: int  # RFC 5424's code


@compiled
def put_literal(at: int, literal: int, length: int, quoting: int) -> int:
    """Append a part of a format, which is printable already, with what its quoting needs."""
    for i in range(length):
        byte = int64(load_u8(literal + i))
        if quoting != PLAIN and (byte in (34, 92) or (byte == 93 and quoting == STRUCTURED_DATA)):
            store_u8(at, 92)
            at += 1
        store_u8(at, byte)
        at += 1
    return at


@compiled
def put_plain_literal(at: int, literal: int, length: int) -> int:
    """Append a part of a format in which nothing needs quoting."""
    for i in range(0, length, WORD_BYTES):
        store_i64(at + i, load_i64(literal + i))
    return at + length


@compiled
def find_pair(record: int, name: int, length: int) -> int:
    """The address of the last pair whose key is the `length` bytes at `name`, 0 when there is none."""
    found = 0
    for index in range(load_u8(record + PAIR_COUNT)):
        pair = record + PAIRS + index * PAIR_BYTES
        same = min(int64(load_u8(pair + KEY_LENGTH)), KEY_BYTES) == length
        if same:
            for i in range(length):
                same = same and load_u8(pair + KEY + i) == load_u8(name + i)
        if same:
            found = pair
    return found


@compiled
def put_value(at: int, pair: int, quoting: int, printable: Any) -> int:
    """Append a pair's value."""
    length = min(int64(load_u8(pair + VALUE_LENGTH)), VALUE_BYTES)
    return put_printable(at, pair + VALUE, length, quoting, printable)


@compiled
def put_message(at: int, batch: Any, index: int, quoting: int) -> int:
    """Append a record's message: its text, or its arguments as their format says."""
    record = batch.records.ctypes.data + index * RECORD_BYTES
    number = int64(load_u16(record + FORMAT))
    length = min(int64(load_u8(record + LENGTH)), MESSAGE_BYTES_MAX)
    if number == 0:
        return put_printable(at, record + MESSAGE, length, quoting, batch.printable)
    if number >= FORMATS_MAX:
        return put_field(at, UNREGISTERED, number, IS_NOT_REGISTERED)
    count = min(length // 8, ARGUMENTS_MAX)
    row = int64(batch.origins[index]) * FORMATS_MAX + number
    literals = batch.literals.ctypes.data + row * LITERAL_BYTES
    step = batch.steps.ctypes.data + row * STEPS_MAX * STEP_BYTES
    for _ in range(STEPS_MAX):
        kind = int64(load_u16(step + STEP_KIND))
        argument = int64(load_u16(step + STEP_ARGUMENT))
        if kind == END:
            break
        if kind == PLAIN_LITERAL:
            at = put_plain_literal(at, literals + argument, load_u16(step + STEP_LENGTH))
        elif kind == LITERAL:
            at = put_literal(at, literals + argument, load_u16(step + STEP_LENGTH), quoting)
        elif kind == PAIR_VALUE:
            pair = find_pair(record, literals + argument, load_u16(step + STEP_LENGTH))
            if pair:
                at = put_value(at, pair, quoting, batch.printable)
        elif kind == ADDRESS_AND_PORT:
            if argument + ENDPOINT_ARGUMENTS <= count:
                at = put_endpoint(at, record + MESSAGE + 8 * argument)
        elif argument < count:
            at = put_argument(at, kind, record + MESSAGE + 8 * argument)
        step += STEP_BYTES
    return at


@compiled
def put_argument(at: int, kind: int, address: int) -> int:
    """Append one typed argument."""
    value = int64(load_i64(address))
    if kind == DECIMAL:
        return put_number(at, value)
    if kind == ADDRESS:
        return put_address(at, value)
    if kind == PORT:
        return put_number(at, value & 0xFFFF)
    if kind == REAL:
        return put_real(at, load_f64(address))
    if kind == DURATION:
        return put_duration(at, value)
    store_u8(at, 48)
    store_u8(at + 1, 120)
    digits = 1
    while digits < 16 and (value >> (4 * digits)) & ((1 << (64 - 4 * digits)) - 1):
        digits += 1
    return put_hex(at + 2, value, digits)


@compiled
def put_key(at: int, pair: int, spelling: int, quoting: int, printable: Any) -> int:
    """Append a pair's key: as it is, as an SD-NAME, or as journald's capital letters."""
    length = min(int64(load_u8(pair + KEY_LENGTH)), KEY_BYTES)
    if spelling == AS_IT_IS:
        return put_printable(at, pair + KEY, length, quoting, printable)
    if length == 0:
        store_u8(at, 95)
        return at + 1
    for i in range(length):
        byte = int64(load_u8(pair + KEY + i))
        is_letter = 65 <= byte <= 90 or 97 <= byte <= 122
        if spelling == UPPER and 97 <= byte <= 122:
            byte -= 32
        store_u8(at + i, byte if is_letter or 48 <= byte <= 57 else 95)
    return at + length


@compiled
def is_shown_here(record: int, frame: Any) -> bool:
    """Whether a sink wants this record."""
    return load_u8(record + SEVERITY) <= frame.levels[load_u8(record + FACILITY)]


@compiled
def format_text(batch: Any, first: int, frame: Any, out: Any, ends: Any) -> Any:
    """`[Info] [Ingress] message`: records from `first` on; return (records done, lines, bytes), as all formats do."""
    start = int64(out.ctypes.data)
    at, lines, index = start, 0, first
    room = start + len(out) - LINE_BYTES_MAX
    while index < len(batch.records) and at < room:
        record = batch.records.ctypes.data + index * RECORD_BYTES
        index += 1
        if not is_shown_here(record, frame):
            continue
        if frame.colours:
            at = put(at, COLOURS[load_u8(record + SEVERITY)])
        if frame.timestamps:
            at = put_time(at, int64(load_i64(record + TIMESTAMP)) + frame.realtime_offset_ns)
            store_u8(at, 32)
            at += 1
        store_u8(at, 91)
        at = put(at + 1, SEVERITY_NAMES[load_u8(record + SEVERITY)])
        store_u8(at, 93)
        store_u8(at + 1, 32)
        store_u8(at + 2, 91)
        at = put(at + 3, FACILITY_NAMES[load_u8(record + FACILITY)])
        store_u8(at, 93)
        store_u8(at + 1, 32)
        at = put_message(at + 2, batch, index - 1, PLAIN)
        if frame.fields:
            if load_u8(record + CORE) != CORE_NONE:
                at = put_field(at, TEXT_CORE, load_u8(record + CORE), NOTHING)
            at = put_field(at, TEXT_PID, load_u32(record + PROCESS), TEXT_TID)
            at = put_field(at, NOTHING, load_u32(record + THREAD), TEXT_SEQUENCE)
            at = put_number(at, load_i64(record + SEQUENCE))
            at = put_text_pairs(at, record, batch.printable)
        if frame.colours:
            at = put(at, UNCOLOURED)
        store_u8(at, 10)
        at += 1
        ends[lines] = at - start
        lines += 1
    return index, lines, at - start


@compiled
def put_text_pairs(at: int, record: int, printable: Any) -> int:
    """Append ` key="value"` for each pair."""
    for i in range(load_u8(record + PAIR_COUNT)):
        pair = record + PAIRS + i * PAIR_BYTES
        store_u8(at, 32)
        at = put_key(at + 1, pair, AS_IT_IS, PLAIN, printable)
        store_u8(at, 61)
        store_u8(at + 1, 34)
        at = put_value(at + 2, pair, JSON, printable)
        store_u8(at, 34)
        at += 1
    return at


@compiled
def format_json(batch: Any, first: int, frame: Any, out: Any, ends: Any) -> Any:
    """One JSON object a line."""
    start = int64(out.ctypes.data)
    at, lines, index = start, 0, first
    room = start + len(out) - LINE_BYTES_MAX
    while index < len(batch.records) and at < room:
        record = batch.records.ctypes.data + index * RECORD_BYTES
        index += 1
        if not is_shown_here(record, frame):
            continue
        timestamp_ns = int64(load_i64(record + TIMESTAMP))
        at = put_time(put(at, JSON_TIME), timestamp_ns + frame.realtime_offset_ns)
        at = put(put(at, JSON_SEVERITY), SEVERITY_NAMES[load_u8(record + SEVERITY)])
        at = put(put(at, JSON_FACILITY), FACILITY_NAMES[load_u8(record + FACILITY)])
        at = put_message(put(at, JSON_MESSAGE), batch, index - 1, JSON)
        at = put(at, JSON_CORE)
        core = int64(load_u8(record + CORE))
        at = put_number(at, core) if core != CORE_NONE else put(at, NULL)
        at = put_field(at, JSON_PID, load_u32(record + PROCESS), JSON_TID)
        at = put_field(at, NOTHING, load_u32(record + THREAD), JSON_SEQUENCE)
        at = put_field(at, NOTHING, load_i64(record + SEQUENCE), JSON_TIMESTAMP)
        at = put_field(at, NOTHING, timestamp_ns, JSON_PAIRS)
        for i in range(load_u8(record + PAIR_COUNT)):
            pair = record + PAIRS + i * PAIR_BYTES
            if i:
                store_u8(at, 44)
                at += 1
            store_u8(at, 34)
            at = put_key(at + 1, pair, AS_IT_IS, JSON, batch.printable)
            store_u8(at, 34)
            store_u8(at + 1, 58)
            store_u8(at + 2, 34)
            at = put_value(at + 3, pair, JSON, batch.printable)
            store_u8(at, 34)
            at += 1
        at = put(at, JSON_END)
        ends[lines] = at - start
        lines += 1
    return index, lines, at - start


@compiled
def format_syslog(batch: Any, first: int, frame: Any, out: Any, ends: Any) -> Any:
    """RFC 5424 messages, without framing: PRI, time, host, application, pid, the facility as MSGID, structured data."""
    start = int64(out.ctypes.data)
    at, lines, index = start, 0, first
    room = start + len(out) - LINE_BYTES_MAX
    while index < len(batch.records) and at < room:
        record = batch.records.ctypes.data + index * RECORD_BYTES
        index += 1
        if not is_shown_here(record, frame):
            continue
        store_u8(at, 60)
        at = put_number(at + 1, frame.syslog_facility * SYSLOG_FACILITY_SHIFT + load_u8(record + SEVERITY))
        store_u8(at, 62)
        store_u8(at + 1, 49)
        store_u8(at + 2, 32)
        at = put_time(at + 3, int64(load_i64(record + TIMESTAMP)) + frame.realtime_offset_ns)
        store_u8(at, 32)
        at = put(at + 1, frame.host)
        at = put_number(at, load_u32(record + PROCESS))
        store_u8(at, 32)
        at = put(at + 1, FACILITY_NAMES[load_u8(record + FACILITY)])
        at = put_field(at, SYSLOG_ID, load_u32(record + THREAD), SYSLOG_SEQUENCE)
        at = put_number(at, load_i64(record + SEQUENCE))
        if load_u8(record + CORE) != CORE_NONE:
            at = put_field(at, SYSLOG_CORE, load_u8(record + CORE), NOTHING)
        for i in range(load_u8(record + PAIR_COUNT)):
            pair = record + PAIRS + i * PAIR_BYTES
            store_u8(at, 34)
            store_u8(at + 1, 32)
            at = put_key(at + 2, pair, SD_NAME, PLAIN, batch.printable)
            store_u8(at, 61)
            store_u8(at + 1, 34)
            at = put_value(at + 2, pair, STRUCTURED_DATA, batch.printable)
        at = put_message(put(at, SYSLOG_END), batch, index - 1, PLAIN)
        ends[lines] = at - start
        lines += 1
    return index, lines, at - start


@compiled
def format_journal(batch: Any, first: int, frame: Any, out: Any, ends: Any) -> Any:
    """Datagrams of journald's native protocol: a field a line."""
    start = int64(out.ctypes.data)
    at, lines, index = start, 0, first
    room = start + len(out) - LINE_BYTES_MAX
    while index < len(batch.records) and at < room:
        record = batch.records.ctypes.data + index * RECORD_BYTES
        index += 1
        if not is_shown_here(record, frame):
            continue
        at = put_message(put(at, JOURNAL_MESSAGE), batch, index - 1, PLAIN)
        at = put_field(at, JOURNAL_PRIORITY, load_u8(record + SEVERITY), JOURNAL_IDENTIFIER)
        at = put(at, FACILITY_NAMES[load_u8(record + FACILITY)])
        if load_u8(record + CORE) != CORE_NONE:
            at = put_field(at, JOURNAL_CORE, load_u8(record + CORE), NOTHING)
        at = put_field(at, JOURNAL_PID, load_u32(record + PROCESS), JOURNAL_TID)
        at = put_field(at, NOTHING, load_u32(record + THREAD), JOURNAL_SEQUENCE)
        at = put_field(at, NOTHING, load_i64(record + SEQUENCE), JOURNAL_TIMESTAMP)
        at = put_number(at, load_i64(record + TIMESTAMP))
        for i in range(load_u8(record + PAIR_COUNT)):
            pair = record + PAIRS + i * PAIR_BYTES
            at = put_key(put(at, JOURNAL_PAIR), pair, UPPER, PLAIN, batch.printable)
            store_u8(at, 61)
            at = put_value(at + 1, pair, PLAIN, batch.printable)
        store_u8(at, 10)
        at += 1
        ends[lines] = at - start
        lines += 1
    return index, lines, at - start


FORMATTERS = {"text": format_text, "json": format_json, "syslog": format_syslog, "journal": format_journal}
