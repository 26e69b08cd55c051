"""pcapng: the blocks of a capture file that mcrctl writes, as bytes. Pure. Names are those of the specification.

Source: draft-ietf-opsawg-pcapng. All numbers are little-endian, which the section header tells.
"""

import struct
from collections.abc import Sequence

SECTION_HEADER_BLOCK = 0x0A0D0D0A
INTERFACE_DESCRIPTION_BLOCK = 0x00000001
INTERFACE_STATISTICS_BLOCK = 0x00000005
ENHANCED_PACKET_BLOCK = 0x00000006
BYTE_ORDER_MAGIC = 0x1A2B3C4D
VERSION_MAJOR, VERSION_MINOR = 1, 0
SECTION_LENGTH_UNKNOWN = 0xFFFF_FFFF_FFFF_FFFF
LINKTYPE_ETHERNET = 1

OPT_ENDOFOPT = 0
OPT_COMMENT = 1
SHB_OS = 3
SHB_USERAPPL = 4
IF_NAME = 2
IF_DESCRIPTION = 3
IF_TSRESOL = 9
EPB_FLAGS = 2
ISB_STARTTIME = 2
ISB_ENDTIME = 3
ISB_IFRECV = 4
ISB_IFDROP = 5
ISB_FILTERACCEPT = 6
ISB_OSDROP = 7
ISB_USRDELIV = 8

NANOSECONDS = 9  # if_tsresol: the power of ten, negated
# epb_flags: bits 0 and 1 tell the direction, 2 to 4 how it was received
FLAG_INBOUND = 0b01
FLAG_OUTBOUND = 0b10
FLAG_UNICAST = 0b001 << 2
FLAG_MULTICAST = 0b010 << 2
FLAG_BROADCAST = 0b011 << 2
FLAG_PROMISCUOUS = 0b100 << 2

_FRAME = struct.Struct("<II")  # block type, total length
_LENGTH = struct.Struct("<I")
_PACKET = struct.Struct("<IIIIIII")
_OPTION = struct.Struct("<HH")
_FLAGS_AND_END = struct.Struct("<HHIHHI")  # epb_flags, opt_endofopt, total length
_PADDING = (b"", b"\0\0\0", b"\0\0", b"\0")  # by length modulo 4

Option = tuple[int, bytes]


def _options(options: Sequence[Option]) -> bytes:
    encoded = b"".join(_OPTION.pack(code, len(value)) + value + _PADDING[len(value) % 4] for code, value in options)
    return encoded + _OPTION.pack(OPT_ENDOFOPT, 0) if options else b""


def _block(kind: int, body: bytes) -> bytes:
    total = len(body) + 12
    return _FRAME.pack(kind, total) + body + _LENGTH.pack(total)


def _timestamp(time_ns: int) -> bytes:
    return struct.pack("<II", time_ns >> 32, time_ns & 0xFFFF_FFFF)


def section_header(application: str, system: str, comment: str) -> bytes:
    """The beginning of a file."""
    body = struct.pack("<IHHQ", BYTE_ORDER_MAGIC, VERSION_MAJOR, VERSION_MINOR, SECTION_LENGTH_UNKNOWN)
    options = [(OPT_COMMENT, comment.encode()), (SHB_OS, system.encode()), (SHB_USERAPPL, application.encode())]
    return _block(SECTION_HEADER_BLOCK, body + _options(options))


def interface_description(name: str, description: str, snaplen_bytes: int) -> bytes:
    """An interface; the first in a file has the number 0. `snaplen_bytes` 0: packets are whole."""
    options = [
        (IF_NAME, name.encode()),
        (IF_DESCRIPTION, description.encode()),
        (IF_TSRESOL, bytes([NANOSECONDS])),
    ]
    body = struct.pack("<HHI", LINKTYPE_ETHERNET, 0, snaplen_bytes)
    return _block(INTERFACE_DESCRIPTION_BLOCK, body + _options(options))


def enhanced_packet(interface: int, time_ns: int, data: bytes, original_bytes: int, flags: int) -> bytes:
    """A packet, of which `data` was kept. `time_ns` since 1970."""
    length = len(data)
    padding = _PADDING[length % 4]
    total = _FRAME.size + 20 + length + len(padding) + _FLAGS_AND_END.size
    return b"".join(
        (
            _PACKET.pack(
                ENHANCED_PACKET_BLOCK, total, interface, time_ns >> 32, time_ns & 0xFFFF_FFFF, length, original_bytes
            ),
            data,
            padding,
            _FLAGS_AND_END.pack(EPB_FLAGS, 4, flags, OPT_ENDOFOPT, 0, total),
        )
    )


def interface_statistics(
    interface: int, start_ns: int, end_ns: int, accepted: int, dropped: int, delivered: int
) -> bytes:
    """The counts of an interface: frames that passed the filter, those the kernel had no room for, packets written.

    What the kernel lost is isb_osdrop. It stands in isb_ifdrop, too, where libpcap's programs put and look for it.
    """
    counts = (
        (ISB_IFRECV, accepted),
        (ISB_IFDROP, dropped),
        (ISB_FILTERACCEPT, accepted),
        (ISB_OSDROP, dropped),
        (ISB_USRDELIV, delivered),
    )
    options = [
        (ISB_STARTTIME, _timestamp(start_ns)),
        (ISB_ENDTIME, _timestamp(end_ns)),
        *((code, struct.pack("<Q", count)) for code, count in counts),
    ]
    body = struct.pack("<I", interface) + _timestamp(end_ns)
    return _block(INTERFACE_STATISTICS_BLOCK, body + _options(options))
