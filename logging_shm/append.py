"""Appending: numbers, times, names and untrusted text to a buffer of bytes, in compiled code.

Every function takes the address to write at and returns that behind what it wrote. None checks for room: the caller
leaves LINE_BYTES_MAX for a line, more than one can need, and the few bytes by which copies of whole words overshoot.
"""

import math
from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
from numba import types

from logging_shm.atomics import int64, load_i64, load_u8, load_u16, load_u32, store_i64, store_u8
from logging_shm.jit import compiled
from logging_shm.render import UNICODE_SHOWN, is_shown

# How a value is quoted, and what that makes of bytes that mean something there.
PLAIN, JSON, STRUCTURED_DATA = range(3)

WORD_BYTES = 8
MIN_I64 = np.iinfo(np.int64).min
DAYS_PER_400_YEARS = 146_097
DAYS_0000_TO_1970 = 719_468
gcvt: Any = types.ExternalFunction("gcvt", types.intp(types.float64, types.int32, types.intp))


def constant(text: str, words: int = 0) -> Any:
    """i8[…]: the length of a text, then its bytes in whole words, at least `words`: as `put` wants it."""
    encoded = text.encode()
    padded = encoded.ljust(max(-(-len(encoded) // WORD_BYTES), words) * WORD_BYTES, b"\0")
    return np.array([len(encoded), *np.frombuffer(padded, np.int64)])


def constants(names: Iterable[str]) -> Any:
    """i8[n, 3]: names of at most 16 bytes, each as `constant` has it."""
    return np.array([constant(name, 2) for name in names])


MIN_I64_DIGITS = constant("9223372036854775808")
NANOSECONDS = constant(" ns")
MICROSECONDS = constant(" µs")
MILLISECONDS = constant(" ms")
SECONDS = constant(" s")
NAN = constant("nan")
MAPPED_WORD = 0xFFFF_0000  # of ::ffff:0:0/96, as it is loaded


@cache
def printable_table() -> Any:
    """u1[UNICODE_SHOWN]: which characters may stand in a line as they are."""
    return np.fromiter((is_shown(chr(code)) for code in range(UNICODE_SHOWN)), np.uint8, UNICODE_SHOWN)


@compiled
def put(at: int, text: Any) -> int:
    """Append a constant; return the address behind it, as all that follow."""
    for word in range(1, len(text)):
        store_i64(at + WORD_BYTES * (word - 1), text[word])
    return at + text[0]


@compiled
def put_number(at: int, value: int) -> int:
    """Append a signed number in decimal."""
    value = int64(value)
    if value < 0:
        store_u8(at, 45)
        at += 1
        if value == MIN_I64:
            return put(at, MIN_I64_DIGITS)
        value = -value
    digits = 1
    rest = value
    while rest >= 10:
        rest //= 10
        digits += 1
    return put_digits(at, value, digits)


@compiled
def put_digits(at: int, value: int, digits: int) -> int:
    """Append the last `digits` decimal digits of a number that is not negative."""
    for i in range(digits):
        store_u8(at + digits - 1 - i, 48 + value % 10)
        value //= 10
    return at + digits


@compiled
def put_hex(at: int, value: int, digits: int) -> int:
    """Append the low `digits` hexadecimal digits."""
    for i in range(digits):
        nibble = (value >> (4 * (digits - 1 - i))) & 15
        store_u8(at + i, nibble + (48 if nibble < 10 else 87))
    return at + digits


@compiled
def put_escape(at: int, quoting: int, letter: int) -> int:
    """Append a backslash, doubled where the quoting needs that, and a letter."""
    store_u8(at, 92)
    at += 1
    if quoting != PLAIN:
        store_u8(at, 92)
        at += 1
    store_u8(at, letter)
    return at + 1


@compiled
def put_escaped_code(at: int, quoting: int, code: int) -> int:
    r"""Append a character as Python's unicode_escape has it: \n, \x1b, \u202e."""
    if code == 10:
        return put_escape(at, quoting, 110)
    if code == 13:
        return put_escape(at, quoting, 114)
    if code == 9:
        return put_escape(at, quoting, 116)
    if code < 0x100:
        return put_hex(put_escape(at, quoting, 120), code, 2)
    if code < 0x10000:
        return put_hex(put_escape(at, quoting, 117), code, 4)
    return put_hex(put_escape(at, quoting, 85), code, 8)


@compiled
def decode(address: int, left: int) -> Any:
    """The character that begins at an address, and its bytes; 0 bytes when it is no UTF-8 (RFC 3629)."""
    lead = int64(load_u8(address))
    if lead < 0xC2 or lead > 0xF4:
        return 0, 0
    size = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
    if size > left:
        return 0, 0
    code = lead & (0x7F >> size)
    for i in range(1, size):
        following = int64(load_u8(address + i))
        if following & 0xC0 != 0x80:
            return 0, 0
        code = code << 6 | following & 0x3F
    if size == 3 and (code < 0x800 or 0xD800 <= code < 0xE000):
        return 0, 0
    if size == 4 and (code < 0x10000 or code > 0x10FFFF):
        return 0, 0
    return code, size


@compiled
def put_printable(at: int, address: int, length: int, quoting: int, printable: Any) -> int:
    """Append bytes of a segment: what is printable as it is, the rest escaped."""
    i = 0
    while i < length:
        byte = int64(load_u8(address + i))
        if byte < 0x80:
            if not 32 <= byte < 127:
                at = put_escaped_code(at, quoting, byte)
            else:
                if quoting != PLAIN and (byte in (34, 92) or (byte == 93 and quoting == STRUCTURED_DATA)):
                    store_u8(at, 92)
                    at += 1
                store_u8(at, byte)
                at += 1
            i += 1
            continue
        code, size = decode(address + i, length - i)
        if size == 0:
            at = put_escaped_code(at, quoting, byte)
            i += 1
            continue
        if code < len(printable) and printable[code]:
            for k in range(size):
                store_u8(at + k, load_u8(address + i + k))
            at += size
        else:
            at = put_escaped_code(at, quoting, code)
        i += size
    return at


@compiled
def put_address(at: int, value: int) -> int:
    """Append an IPv4 address given as a number."""
    for shift in (24, 16, 8, 0):
        at = put_number(at, (value >> shift) & 0xFF)
        if shift:
            store_u8(at, 46)
            at += 1
    return at


@compiled
def put_endpoint(at: int, address: int) -> int:
    """Append an address, 16 bytes in network order at `address`, and the port behind it; IPv6 as RFC 5952 says."""
    port = int64(load_u16(address + 16))
    if load_i64(address) == 0 and load_u32(address + 8) == MAPPED_WORD:
        for i in range(12, 16):
            at = put_number(at, load_u8(address + i))
            store_u8(at, 46 if i < 15 else 58)
            at += 1
        return put_number(at, port)
    store_u8(at, 91)
    at = put_groups(at + 1, address)
    store_u8(at, 93)
    store_u8(at + 1, 58)
    return put_number(at + 2, port)


@compiled
def group_of(address: int, index: int) -> int:
    """One of the eight groups of an IPv6 address."""
    return int64(load_u8(address + 2 * index)) << 8 | int64(load_u8(address + 2 * index + 1))


@compiled
def put_groups(at: int, address: int) -> int:
    """Append an IPv6 address, the first of its longest runs of at least two zero groups as `::`."""
    longest, begin, run = 1, 8, 0
    for i in range(8):
        run = run + 1 if group_of(address, i) == 0 else 0
        if run > longest:
            longest, begin = run, i + 1 - run
    i = 0
    while i < 8:
        if i == begin:
            store_u8(at, 58)
            store_u8(at + 1, 58)
            at += 2
            i += longest
            continue
        if i and i != begin + longest:
            store_u8(at, 58)
            at += 1
        group = group_of(address, i)
        digits = 4 if group > 0xFFF else 3 if group > 0xFF else 2 if group > 0xF else 1
        at = put_hex(at, group, digits)
        i += 1
    return at


@compiled
def put_duration(at: int, value_ns: int) -> int:
    """Append nanoseconds in the greatest unit that they fill."""
    if -1000 < value_ns < 1000:
        return put(put_number(at, value_ns), NANOSECONDS)
    if value_ns < 0:
        store_u8(at, 45)
        at += 1
        # The least number has no positive twin; its microseconds have.
        value_us = -(value_ns // 1000) - (1 if value_ns % 1000 else 0)
        rest_ns = (1000 - value_ns % 1000) % 1000
    else:
        value_us = value_ns // 1000
        rest_ns = value_ns % 1000
    if value_us < 1000:
        return put(put_decimals(at, value_us, rest_ns), MICROSECONDS)
    if value_us < 1_000_000:
        return put(put_decimals(at, value_us // 1000, value_us % 1000), MILLISECONDS)
    return put(put_decimals(at, value_us // 1_000_000, value_us % 1_000_000 // 1000), SECONDS)


@compiled
def put_decimals(at: int, whole: int, thousandths: int) -> int:
    """Append a number with three decimals."""
    at = put_number(at, whole)
    store_u8(at, 46)
    return put_digits(at + 1, thousandths, 3)


@compiled
def put_real(at: int, value: float) -> int:
    """Append a float as printf's %g does."""
    if math.isnan(value):
        return put(at, NAN)
    gcvt(value, 6, at)
    for _ in range(32):
        if load_u8(at) == 0:
            break
        at += 1
    return at


@compiled
def put_time(at: int, wall_ns: int) -> int:
    """Append a time as RFC 3339 has it, in UTC with microseconds. The calendar is Howard Hinnant's days algorithm."""
    seconds = wall_ns // 1_000_000_000
    days = seconds // 86_400
    second = seconds % 86_400
    days += DAYS_0000_TO_1970
    era = days // DAYS_PER_400_YEARS
    day_of_era = days % DAYS_PER_400_YEARS
    year_of_era = (day_of_era - day_of_era // 1460 + day_of_era // 36_524 - day_of_era // 146_096) // 365
    day_of_year = day_of_era - (365 * year_of_era + year_of_era // 4 - year_of_era // 100)
    shifted_month = (5 * day_of_year + 2) // 153  # 0 is March
    day = day_of_year - (153 * shifted_month + 2) // 5 + 1
    month = shifted_month + 3 if shifted_month < 10 else shifted_month - 9
    year = year_of_era + era * 400 + (1 if month <= 2 else 0)
    at = put_digits(at, year % 10_000, 4)
    store_u8(at, 45)
    at = put_digits(at + 1, month, 2)
    store_u8(at, 45)
    at = put_digits(at + 1, day, 2)
    store_u8(at, 84)
    at = put_digits(at + 1, second // 3600, 2)
    store_u8(at, 58)
    at = put_digits(at + 1, second // 60 % 60, 2)
    store_u8(at, 58)
    at = put_digits(at + 1, second % 60, 2)
    store_u8(at, 46)
    at = put_digits(at + 1, wall_ns % 1_000_000_000 // 1000, 6)
    store_u8(at, 90)
    return at + 1


@compiled
def put_field(at: int, name: Any, value: int, behind: Any) -> int:
    """Append a name, a number and what follows it."""
    return put(put_number(put(at, name), value), behind)
