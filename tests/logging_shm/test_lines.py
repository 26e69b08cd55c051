"""Lines: compiled formatters say what slow Python says, and no bytes of a segment can forge a line or overrun one."""

import datetime
import json
import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from logging_shm import Facility, LogEntry, Reader, Severity, SharedSPSCRingBuffer
from logging_shm.append import (
    JSON,
    PLAIN,
    STRUCTURED_DATA,
    constant,
    printable_table,
    put_address,
    put_digits,
    put_duration,
    put_endpoint,
    put_hex,
    put_number,
    put_printable,
    put_real,
    put_time,
)
from logging_shm.layout import (
    CORE_NONE,
    FORMAT_BYTES_MAX,
    FORMATS_MAX,
    FORMATS_OFFSET,
    MESSAGE_BYTES_MAX,
    PAIR,
    PAIR_KEY_BYTES_MAX,
    PAIRS_MAX,
    RECORD,
    RECORD_BYTES,
)
from logging_shm.lines import FORMATTERS, LINE_BYTES_MAX, Frame
from logging_shm.render import ENDPOINT, KINDS, duration, endpoint, printable
from tests.logging_shm.reading import HOST, MAX_I64, MIN_I64, SHARED_FIXTURE, MakeRing, int64s, lines, put, record

PRINTABLE = printable_table()
EVERY_FORMAT = pytest.mark.parametrize("kind", FORMATTERS)
RFC_3339 = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"
SD_NAME = r"[!#-<>-Z\\^-~]{1,32}"  # RFC 5424, section 6.3.3
SD_VALUE = r'(?:[^"\\\]]|\\["\\\]])*'
SYSLOG = re.compile(
    rf"<(?P<priority>\d{{1,3}})>1 (?P<time>{RFC_3339}) (?P<host>[!-~]{{1,255}}) (?P<application>[!-~]{{1,48}}) "
    rf"(?P<process>[!-~]{{1,128}}) (?P<id>[!-~]{{1,32}}) "
    rf'\[mcr@32473(?P<fields>(?: {SD_NAME}="{SD_VALUE}")*)\] (?P<message>.*)'
)
SD_FIELD = re.compile(rf' ({SD_NAME})="({SD_VALUE})"')
JOURNAL_FIELD = re.compile(r"([A-Z][A-Z0-9_]{0,63})=(.*)")


def written(put_it: Callable[..., int], *arguments: Any) -> str:
    """What a compiled function appends."""
    out = np.full(LINE_BYTES_MAX, 0x55, np.uint8)
    start = out.ctypes.data
    return out[: put_it(start, *arguments) - start].tobytes().decode()


# --- parts of a line ------------------------------------------------------------------------------


@given(int64s)
@example(MIN_I64)
@example(MAX_I64)
@example(0)
def test_a_number_is_written_as_python_writes_it(value: int) -> None:
    assert written(put_number, value) == str(value)


@given(st.integers(0, MAX_I64), st.integers(1, 19))
def test_digits_are_the_last_ones_with_leading_zeros(value: int, digits: int) -> None:
    assert written(put_digits, value, digits) == str(value).zfill(digits)[-digits:]


@given(int64s, st.integers(1, 16))
def test_hexadecimal_digits_are_the_low_ones(value: int, digits: int) -> None:
    assert written(put_hex, value, digits) == f"{value & 0xFFFF_FFFF_FFFF_FFFF:016x}"[-digits:]


@given(int64s)
def test_an_address_is_written_as_python_writes_it(value: int) -> None:
    assert written(put_address, value) == KINDS["ip"](value)


groups = st.lists(st.sampled_from([0, 0, 0, 1, 0x10, 0x200, 0xABCD, 0xFFFF]), min_size=8, max_size=8)
mapped = st.builds(lambda raw: bytes(10) + b"\xff\xff" + raw, st.binary(min_size=4, max_size=4))


@given(groups.map(lambda numbers: struct.pack(">8H", *numbers)) | mapped, int64s)
def test_an_address_with_its_port_is_as_ipaddress_writes_it(raw: bytes, port: int) -> None:
    memory = np.frombuffer(raw + struct.pack("<q", port), np.uint8).copy()

    def put_it(at: int, address: int) -> int:
        return int(put_endpoint(at, address))

    first, second = struct.unpack("<qq", raw)
    assert written(put_it, memory.ctypes.data) == endpoint(first, second, port)


@given(int64s | st.integers(-2_000_000_000, 2_000_000_000))
@example(MIN_I64)
@example(MAX_I64)
@example(-1000)
@example(999_999_999)
def test_a_duration_is_written_as_python_writes_it(value_ns: int) -> None:
    assert written(put_duration, value_ns) == duration(value_ns)


@given(st.floats())
@example(float("nan"))
@example(struct.unpack("<d", b"\1\0\0\0\0\0\xf8\xff")[0])
@example(float("-inf"))
@example(-0.0)
@example(1.7976931348623157e308)
@example(5e-324)
def test_a_float_is_written_as_python_writes_it(value: float) -> None:
    assert written(put_real, value) == f"{value:g}"


@given(int64s)
@example(0)
@example(-1)
@example(951_782_400_000_000_000)  # 29 February 2000
@example(MIN_I64)
@example(MAX_I64)
def test_a_time_is_written_as_datetime_writes_it(wall_ns: int) -> None:
    epoch = datetime.datetime(1970, 1, 1)
    wall = epoch + datetime.timedelta(microseconds=wall_ns // 1000)
    assert written(put_time, wall_ns) == wall.isoformat(timespec="microseconds") + "Z"


raw_texts = st.one_of(
    st.binary(max_size=MESSAGE_BYTES_MAX),
    st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.lists(st.sampled_from([b"\xe4\xb8", b"\xad", b"\xf0\x9f\x98\x80", b"\xc2\x85", b'"', b"\\", b"]", b"\n"])).map(
        b"".join
    ),
)


@given(raw_texts)
@example(b"\xed\xa0\x80 surrogate")
@example(b"\xe0\x80\xaf \xf0\x80\x80\xaf overlong")
@example(b"\xf4\x90\x80\x80 beyond Unicode")
def test_text_is_made_printable_as_python_makes_it(raw: bytes) -> None:
    text = np.frombuffer(raw + b"\x80", np.uint8)  # what follows must not be taken for part of it
    assert written(put_printable, text.ctypes.data, len(raw), PLAIN, PRINTABLE) == printable(raw)


@given(raw_texts)
def test_text_for_json_is_the_inside_of_a_json_string(raw: bytes) -> None:
    text = np.frombuffer(raw + b"\x80", np.uint8)
    shown = written(put_printable, text.ctypes.data, len(raw), JSON, PRINTABLE)
    assert json.loads(f'"{shown}"') == printable(raw)


@given(raw_texts)
def test_text_for_structured_data_can_not_end_its_quotes(raw: bytes) -> None:
    text = np.frombuffer(raw + b"\x80", np.uint8)
    shown = written(put_printable, text.ctypes.data, len(raw), STRUCTURED_DATA, PRINTABLE)
    assert re.fullmatch(SD_VALUE, shown)
    assert re.sub(r"\\(.)", r"\1", shown) == printable(raw)


@given(st.characters())
def test_the_table_of_printable_characters_is_python_s(character: str) -> None:
    encoded = np.frombuffer(character.encode("utf-8", "surrogatepass"), np.uint8)
    shown = written(put_printable, encoded.ctypes.data, len(encoded), PLAIN, PRINTABLE)
    assert (shown == character) == (character.isprintable() and ord(character) < len(PRINTABLE))


# --- whole lines ----------------------------------------------------------------------------------

keys = st.sampled_from([b"rule", b"k", b"caf\xc3\xa9", b"a_b"]) | st.binary(max_size=8)
values = st.binary(max_size=20) | st.sampled_from([b'a"b', b"a]b", b"a\\", b"{0:d}"])
pair_lists = st.lists(st.tuples(keys, values), max_size=2)
templates = st.lists(
    st.one_of(
        st.text(max_size=4),
        st.sampled_from(["{rule}", "{k}", "{café}", "{a_b}", "{nothing}", "{", "}", "\\", '"', "]", "\n", "x"]),
        st.builds("{{{}:{}}}".format, st.integers(0, 9), st.sampled_from([*KINDS, ENDPOINT])),
    ),
    min_size=1,
    max_size=64,
).map(lambda parts: "".join(parts).encode()[:FORMAT_BYTES_MAX].decode(errors="ignore") or "x")
LENGTHS_OF_PAIRS = [
    RECORD["pairs"] + PAIR.bytes * index + PAIR[field] for index in range(2) for field in ("key_length", "value_length")
]
typed = st.lists(int64s, max_size=20).map(lambda values: struct.pack(f"<{len(values)}q", *values))
records = st.builds(
    record,
    message=raw_texts.map(lambda raw: raw[:MESSAGE_BYTES_MAX]) | typed,
    pairs=pair_lists,
    severity=st.sampled_from(Severity),
    number=st.integers(0, 2),
    core=st.integers(0, CORE_NONE),
    timestamp_ns=int64s,
    process=st.integers(0, 2**32 - 1),
    thread=st.integers(0, 2**32 - 1),
)


OVERLONG_KEY = record(pairs=[(b"eight_ch", b"found")], number=1).replace(b"\x08\x05", b"\xff\x05")


@st.composite
def damaged_records(draw: st.DrawFn) -> bytes:
    """Records whose lengths and counts are any."""
    raw = bytearray(draw(records))
    for offset in (RECORD["message_length"], RECORD["pair_count"], *LENGTHS_OF_PAIRS):
        if draw(st.booleans()):
            raw[offset] = draw(st.integers(0, 255))
    return bytes(raw)


def keys_of(raw: bytes) -> list[bytes]:
    """The pairs' keys as they lie in a record."""
    starts = [RECORD["pairs"] + PAIR.bytes * index for index in range(min(RECORD.get(raw, "pair_count"), PAIRS_MAX))]
    return [raw[start + PAIR["key"] :][: min(raw[start + PAIR["key_length"]], PAIR_KEY_BYTES_MAX)] for start in starts]


def word(key: bytes) -> str:
    """A key where only ASCII letters, digits and the underscore may stand."""
    return re.sub(rb"[^A-Za-z0-9_]", b"_", key).decode() or "_"


def timestamp(entry: LogEntry) -> str:
    return written(put_time, entry.timestamp_ns)


def check_text(line: str, entry: LogEntry, raw: bytes) -> None:
    core = "" if entry.core == CORE_NONE else f" core={entry.core}"
    pairs = "".join(f" {key}={quoted(value)}" for key, value in entry.pairs)
    assert line == (
        f"{timestamp(entry)} [{entry.severity.name}] [{entry.facility.name}] {entry.message}{core}"
        f" pid={entry.process} tid={entry.thread} seq={entry.sequence}{pairs}\n"
    )


def quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def check_json(line: str, entry: LogEntry, raw: bytes) -> None:
    assert line.endswith("}\n")
    assert json.loads(line) == {
        "time": timestamp(entry),
        "severity": entry.severity.name,
        "facility": entry.facility.name,
        "message": entry.message,
        "core": None if entry.core == CORE_NONE else entry.core,
        "pid": entry.process,
        "tid": entry.thread,
        "sequence": entry.sequence,
        "timestamp_ns": entry.timestamp_ns,
        "pairs": dict(entry.pairs),
    }


def check_syslog(line: str, entry: LogEntry, raw: bytes) -> None:
    match = SYSLOG.fullmatch(line)
    assert match, line
    assert int(match["priority"]) == 3 * 8 + entry.severity
    assert match["time"] == timestamp(entry)
    assert (match["host"], match["application"]) == (HOST, "mcr")
    assert (match["process"], match["id"]) == (str(entry.process), entry.facility.name)
    assert match["message"] == entry.message
    expected = [("tid", str(entry.thread)), ("seq", str(entry.sequence))]
    if entry.core != CORE_NONE:
        expected.append(("core", str(entry.core)))
    expected += [(word(key), value) for key, (_, value) in zip(keys_of(raw), entry.pairs, strict=True)]
    fields = [(name, re.sub(r"\\(.)", r"\1", value)) for name, value in SD_FIELD.findall(match["fields"])]
    assert fields == expected


def check_journal(line: str, entry: LogEntry, raw: bytes) -> None:
    assert line.endswith("\n")
    fields = [JOURNAL_FIELD.fullmatch(field) for field in line[:-1].split("\n")]
    assert all(fields), line
    expected = [
        ("MESSAGE", entry.message),
        ("PRIORITY", str(int(entry.severity))),
        ("SYSLOG_IDENTIFIER", "mcr"),
        ("MCR_FACILITY", entry.facility.name),
        *([] if entry.core == CORE_NONE else [("MCR_CORE", str(entry.core))]),
        ("MCR_PID", str(entry.process)),
        ("MCR_TID", str(entry.thread)),
        ("MCR_SEQUENCE", str(entry.sequence)),
        ("MCR_TIMESTAMP_NS", str(entry.timestamp_ns)),
    ]
    expected += [(f"MCR_{word(key).upper()}", value) for key, (_, value) in zip(keys_of(raw), entry.pairs, strict=True)]
    assert [field.groups() for field in fields if field] == expected


CHECKS = {"text": check_text, "json": check_json, "syslog": check_syslog, "journal": check_journal}


@pytest.fixture
def ring(make_ring: MakeRing) -> SharedSPSCRingBuffer:
    return make_ring(8)


@pytest.fixture
def reader(ring: SharedSPSCRingBuffer) -> Reader:
    reader = Reader()
    reader.add([ring])
    return reader


@EVERY_FORMAT
@given(raw=damaged_records(), template=templates)
@example(raw=OVERLONG_KEY, template="{eight_ch}")
@example(raw=record(pairs=[("\U00020000".encode(), b"found")], number=1), template="{\U00020000}")
@example(raw=record(b"\0" * 8, [(b"k", b"v")], number=1), template="{k}-" * 32)
@example(raw=record(bytes(range(160)), number=1), template="".join(f"{{{i}:d}}" for i in range(10)))
@settings(SHARED_FIXTURE, max_examples=200)
def test_a_line_says_what_python_reads_from_the_record(
    ring: SharedSPSCRingBuffer, reader: Reader, kind: str, raw: bytes, template: str
) -> None:
    ring.segment.register(1, template)
    put(ring, raw)
    batch = reader.read(everything=True)
    (line,) = lines(batch, kind, timestamps=True, fields=True)
    CHECKS[kind](line, reader.entry(batch, 0), raw)


@given(raw=st.binary(min_size=RECORD_BYTES, max_size=RECORD_BYTES), template=templates)
@EVERY_FORMAT
@SHARED_FIXTURE
def test_any_bytes_of_a_record_make_one_whole_line(
    ring: SharedSPSCRingBuffer, reader: Reader, kind: str, raw: bytes, template: str
) -> None:
    for number in range(1, FORMATS_MAX):
        ring.segment.register(number, template)
    put(ring, raw)
    batch = reader.read(everything=True)
    (line,) = lines(batch, kind, timestamps=True, fields=True)
    CHECKS[kind](line, reader.entry(batch, 0), raw)
    assert all(part.isprintable() for part in line.removesuffix("\n").split("\n" if kind == "journal" else "\0"))


@given(table=st.binary(min_size=FORMAT_BYTES_MAX, max_size=FORMAT_BYTES_MAX), raw=records)
@EVERY_FORMAT
@SHARED_FIXTURE
def test_a_format_that_was_damaged_in_the_segment_makes_one_whole_line(
    ring: SharedSPSCRingBuffer, reader: Reader, kind: str, table: bytes, raw: bytes
) -> None:
    ring.segment.register(1, "about to be damaged")
    start = FORMATS_OFFSET + FORMAT_BYTES_MAX
    ring.segment.memory[start : start + FORMAT_BYTES_MAX] = table
    put(ring, raw)
    batch = reader.read(everything=True)
    (line,) = lines(batch, kind, timestamps=True, fields=True)
    CHECKS[kind](line, reader.entry(batch, 0), raw)


@pytest.mark.parametrize("number", [1, FORMATS_MAX - 1, FORMATS_MAX, 0xFFFF])
@EVERY_FORMAT
def test_a_format_that_is_not_registered_is_told(
    ring: SharedSPSCRingBuffer, reader: Reader, kind: str, number: int
) -> None:
    put(ring, record(b"\1" * 64, number=number))
    (line,) = lines(reader.read(everything=True), kind)
    assert f"(format {number} is not registered)" in line


def test_plain_text_is_severity_facility_and_message_alone(ring: SharedSPSCRingBuffer, reader: Reader) -> None:
    put(ring, record(b"Data plane worker started on core 0", [(b"rule", b"tv")], core=0))
    assert lines(reader.read(everything=True)) == ["[Info] [Test] Data plane worker started on core 0\n"]


def test_colours_go_around_the_line_and_are_ended_in_it(ring: SharedSPSCRingBuffer, reader: Reader) -> None:
    put(ring, record(b"broken", severity=Severity.Error))
    assert lines(reader.read(everything=True), colours=True) == ["\033[31m[Error] [Test] broken\033[0m\n"]


@EVERY_FORMAT
def test_a_sink_gets_only_levels_and_facilities_that_it_wants(make_ring: MakeRing, kind: str) -> None:
    reader = Reader()
    rings = [make_ring(16, facility=facility) for facility in (Facility.Ingress, Facility.Egress)]
    reader.add(rings)
    for ring in rings:
        for severity in Severity:
            put(ring, record(b"it happened", severity=severity))
    wanted = lines(reader.read(everything=True), kind, level=Severity.Error, facilities=frozenset({Facility.Egress}))
    assert len(wanted) == Severity.Error + 1
    assert all("Egress" in line for line in wanted)


# --- room -----------------------------------------------------------------------------------------

CONTROLS = b"\x01" * 20
GRAVE_PAIRS = [(b"a", CONTROLS), (b"\x01" * 8, CONTROLS)]
LONG_PAIRS = [(b'"' * 8, b'"' * 20)] * 2
REALS = struct.pack("<8d", *[-1.23456e-300] * 8)
LONG_FORMATS = (
    b"{a}" * 42,
    b"\x01" * FORMAT_BYTES_MAX,
    b'"' * FORMAT_BYTES_MAX,
    b"]" * FORMAT_BYTES_MAX,
    b"\xff" * FORMAT_BYTES_MAX,
    "é".encode() * 64,
    "\u202e".encode() * 42,
    b"{0:d}" * 25,
    b"{0:g}" * 25,
    b"{0:ip}" * 21,
    b"{0:hex}" * 18,
    b"{0:endpoint}" * 9,
    b"{0:dur}" * 18,
)
LONG_RECORDS = [
    record(body, pairs, 4, number, 200, MIN_I64, 0xFFFFFFFF, 0xFFFFFFFF)
    for pairs in (GRAVE_PAIRS, LONG_PAIRS)
    for number, body in ((0, b"\x01" * 160), (0, b"]" * 160), (1, b"\x80" * 160), (1, REALS), (0xFFFF, b""))
]


def written_bytes(reader: Reader, kind: str) -> int:
    """How far a formatter writes that has room for one line: its last byte that is no longer what it was."""
    batch = reader.read(everything=True)
    assert len(batch.records) == 1
    out = np.full(4 * LINE_BYTES_MAX, 0xA5, np.uint8)
    frame = Frame(
        levels=np.full(len(Facility), 7, np.int8),
        realtime_offset_ns=0,
        timestamps=True,
        fields=True,
        colours=True,
        host=constant("h" * 255 + " " + "a" * 48 + " "),
        syslog_facility=23,
    )
    done, count, size = FORMATTERS[kind](batch, 0, frame, out[: LINE_BYTES_MAX + 1], np.zeros(1, np.int64))
    assert (done, count) == (1, 1)
    end = int(np.flatnonzero(out != 0xA5)[-1]) + 1
    assert size <= end
    return end


@pytest.mark.parametrize("template", LONG_FORMATS)
@EVERY_FORMAT
def test_the_longest_lines_have_room(ring: SharedSPSCRingBuffer, reader: Reader, kind: str, template: bytes) -> None:
    ring.segment.register(1, "x")
    start = FORMATS_OFFSET + FORMAT_BYTES_MAX
    ring.segment.memory[start : start + FORMAT_BYTES_MAX] = template.ljust(FORMAT_BYTES_MAX, b"\0")
    for raw in LONG_RECORDS:
        put(ring, raw)
        assert written_bytes(reader, kind) <= LINE_BYTES_MAX


@given(raw=st.binary(min_size=RECORD_BYTES, max_size=RECORD_BYTES), template=templates)
@EVERY_FORMAT
@SHARED_FIXTURE
def test_no_bytes_of_a_record_need_more_room_than_a_line_has(
    ring: SharedSPSCRingBuffer, reader: Reader, kind: str, raw: bytes, template: str
) -> None:
    for number in range(1, FORMATS_MAX):
        ring.segment.register(number, template)
    put(ring, raw)
    assert written_bytes(reader, kind) <= LINE_BYTES_MAX


@EVERY_FORMAT
def test_a_batch_that_does_not_fit_is_formatted_in_parts(make_ring: MakeRing, kind: str) -> None:
    ring = make_ring(4096)
    reader = Reader()
    reader.add([ring])
    for _ in range(4096):
        put(ring, LONG_RECORDS[0])
    batch = reader.read(everything=True)
    assert len(batch.records) == 4096
    formatted = lines(batch, kind)
    assert len(formatted) == 4096
    entry = reader.entry(batch, 0)
    assert all(entry.message.replace("\\", "\\\\" if kind == "json" else "\\") in line for line in formatted)
