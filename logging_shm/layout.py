"""The layouts of a segment, each defined once: a header page, a page of formats, then the records.

Everything else derives offsets from these tables; tests read a segment with `struct` alone.
"""

from typing import Any, Final

import numpy as np

ABI_VERSION: Final = 1
SEGMENT_MAGIC: Final = 0x31474F4C_52434D00  # "\0MCRLOG1"
RECORD_BYTES: Final = 256
MESSAGE_BYTES_MAX: Final = 160
PAIRS_MAX: Final = 2
PAIR_KEY_BYTES_MAX: Final = 8
PAIR_VALUE_BYTES_MAX: Final = 20
ARGUMENTS_MAX: Final = 6

STATE_EMPTY: Final = 0
STATE_WRITING: Final = 1
STATE_READY: Final = 2

RECORD: Final = np.dtype(
    {
        "names": [
            "state", "severity", "facility", "message_length", "pair_count", "core", "format",
            "timestamp_ns", "sequence", "process", "thread", "message", "pairs",
        ],
        "formats": [
            "u1", "u1", "u1", "u1", "u1", "u1", "<u2", "<i8", "<i8", "<u4", "<u4",
            ("u1", (MESSAGE_BYTES_MAX,)), ("u1", (PAIRS_MAX, 32)),
        ],
        "offsets": [0, 1, 2, 3, 4, 5, 6, 8, 16, 24, 28, 32, 192],
        "itemsize": RECORD_BYTES,
    }
)  # fmt: skip
PAIR_KEY_OFFSET: Final = 4
PAIR_VALUE_OFFSET: Final = 12

# Cursors count records since the segment was made; a record's place is its number modulo capacity.
HEADER: Final = np.dtype(
    {
        "names": [
            "magic", "abi_version", "record_bytes", "capacity", "facility", "core", "instance",
            "owner_pid", "owner_start_ticks", "thread", "realtime_offset_ns", "level_mask",
            "write_cursor", "dropped", "read_cursor",
        ],
        "formats": [
            "<i8", "<u4", "<u4", "<i8", "<u4", "<u4", ("u1", (32,)),
            "<u4", "<u4", "<u4", "<i8", "<u4",
            "<i8", "<i8", "<i8",
        ],
        "offsets": [0, 8, 12, 16, 24, 28, 32, 64, 68, 72, 80, 88, 128, 136, 192],
        "itemsize": 4096,
    }
)  # fmt: skip
FORMATS_MAX: Final = 32
FORMAT_BYTES_MAX: Final = 128
FORMATS: Final = np.dtype(("u1", (FORMATS_MAX, FORMAT_BYTES_MAX)))
FORMATS_OFFSET: Final = HEADER.itemsize
RECORDS_OFFSET: Final = FORMATS_OFFSET + FORMATS_MAX * FORMAT_BYTES_MAX

LEVEL_MASK_ALL: Final = 0xFF


def offset_of(layout: Any, field: str) -> int:
    """The byte offset of `field` in `layout`."""
    return int(layout.fields[field][1])


def segment_bytes(capacity: int) -> int:
    """The size of a segment of `capacity` records."""
    return RECORDS_OFFSET + capacity * RECORD_BYTES
