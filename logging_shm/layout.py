"""The layouts of a segment, each defined once, as data: a header page, a page of formats, then the records.

Offsets, `struct` formats, NumPy views and tests all derive from these tables. Nothing here imports NumPy:
`mcrlog list` starts in the time of a bare interpreter.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

ABI_VERSION: Final = 2
SEGMENT_MAGIC: Final = 0x31474F4C_52434D00  # "\0MCRLOG1"
CACHE_LINE_BYTES: Final = 64


@dataclass(frozen=True)
class Field:
    """One field: where it lies, and the letter that `struct` has for it. `count` over 1 is an array."""

    offset: int
    letter: str
    count: int = 1

    @property
    def bytes(self) -> int:
        """The size of the whole field."""
        return struct.calcsize(f"<{self.letter}") * self.count


class Layout:
    """A record of fields at fixed offsets, little-endian."""

    def __init__(self, size_bytes: int, **fields: Field) -> None:
        self.bytes = size_bytes
        self.fields: Mapping[str, Field] = MappingProxyType(fields)
        self._structs = {name: struct.Struct(f"<{field.letter}") for name, field in fields.items()}

    def __getitem__(self, name: str) -> int:
        """The offset of a field."""
        return self.fields[name].offset

    def get(self, memory: Any, name: str, index: int = 0) -> Any:
        """The value of a field, or of one element of it, in `memory`, where the layout begins."""
        packer = self._structs[name]
        return packer.unpack_from(memory, self.fields[name].offset + index * packer.size)[0]

    def set(self, memory: Any, name: str, value: Any, index: int = 0) -> None:
        """Store a field, or one element of it."""
        packer = self._structs[name]
        packer.pack_into(memory, self.fields[name].offset + index * packer.size, value)


RECORD_BYTES: Final = 256
MESSAGE_BYTES_MAX: Final = 160
PAIRS_MAX: Final = 2
PAIR_KEY_BYTES_MAX: Final = 8
PAIR_VALUE_BYTES_MAX: Final = 20
ARGUMENTS_MAX: Final = 8  # of eight bytes each; the first four lie in the record's first cache line

STATE_EMPTY: Final = 0
STATE_WRITING: Final = 1
STATE_READY: Final = 2

RECORD: Final = Layout(
    RECORD_BYTES,
    state=Field(0, "B"),
    severity=Field(1, "B"),
    facility=Field(2, "B"),
    message_length=Field(3, "B"),
    pair_count=Field(4, "B"),
    core=Field(5, "B"),
    format=Field(6, "H"),
    timestamp_ns=Field(8, "q"),
    sequence=Field(16, "q"),
    process=Field(24, "I"),
    thread=Field(28, "I"),
    message=Field(32, "B", MESSAGE_BYTES_MAX),
    pairs=Field(192, "B", PAIRS_MAX * 32),
)
PAIR: Final = Layout(
    32,
    key_length=Field(0, "B"),
    value_length=Field(1, "B"),
    key=Field(4, "B", PAIR_KEY_BYTES_MAX),
    value=Field(12, "B", PAIR_VALUE_BYTES_MAX),
)

FORMATS_MAX: Final = 32  # format numbers are 1 … 31; 0 says that the message is text
FORMAT_BYTES_MAX: Final = 128
SEVERITIES: Final = 8
CORE_NONE: Final = 255  # of a process that is not pinned
FLAG_OVERWRITE: Final = 1

# Cursors count records since the segment was made; a record's place is its number modulo capacity, a power of two.
# A cache line has one writer: the writer's and the reader's cursors never share one.
HEADER: Final = Layout(
    4096,
    magic=Field(0, "q"),
    abi_version=Field(8, "I"),
    record_bytes=Field(12, "I"),
    capacity=Field(16, "q"),
    facility=Field(24, "I"),
    core=Field(28, "I"),
    instance=Field(32, "B", 32),
    # The process that writes now, and its thread: one 8-byte load for both.
    process=Field(64, "I"),
    thread=Field(68, "I"),
    process_start_ticks=Field(72, "q"),
    # The process that made the segment and unlinks it.
    creator=Field(80, "I"),
    flags=Field(84, "I"),
    creator_start_ticks=Field(88, "q"),
    realtime_offset_ns=Field(96, "q"),
    formats_registered=Field(104, "I"),
    level_mask=Field(112, "I"),
    # facility and core where the record's first eight bytes have them, and the state READY
    record_head=Field(120, "q"),
    # --- written by the writer
    write_cursor=Field(128, "q"),
    read_cursor_seen=Field(136, "q"),
    unfinished=Field(144, "q"),
    scratch=Field(160, "q", 2),  # a timespec
    dropped=Field(192, "q", SEVERITIES),
    # --- written by the reader
    read_cursor=Field(256, "q"),
    # --- a token bucket for each format number, as the generic cell rate algorithm has it
    limits=Field(512, "q", FORMATS_MAX * 4),
)
LIMIT: Final = Layout(
    32,
    earliest_ns=Field(0, "q"),  # when the bucket is full again: its theoretical arrival time
    interval_ns=Field(8, "q"),  # between two tokens; 0: no limit
    burst_ns=Field(16, "q"),  # how far earliest_ns may lie ahead
    suppressed=Field(24, "q"),
)
FORMATS_OFFSET: Final = HEADER.bytes
RECORDS_OFFSET: Final = FORMATS_OFFSET + FORMATS_MAX * FORMAT_BYTES_MAX

CAPACITY_MAX: Final = 1 << 24
LEVEL_MASK_ALL: Final = 0xFF


def segment_bytes(capacity: int) -> int:
    """The size of a segment of `capacity` records."""
    return RECORDS_OFFSET + capacity * RECORD_BYTES


def pair_key(text: str) -> tuple[int, int]:
    """A pair's key, at most 8 bytes, as compiled code takes it: its bytes as a number, and its length."""
    encoded = text.encode()
    assert 0 < len(encoded) <= PAIR_KEY_BYTES_MAX
    return int.from_bytes(encoded.ljust(PAIR_KEY_BYTES_MAX, b"\0"), "little", signed=True), len(encoded)
