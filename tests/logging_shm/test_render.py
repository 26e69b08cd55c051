"""Rendering, pure: bytes nobody vouches for become printable text, typed arguments become words."""

import re
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logging_shm.layout import MESSAGE_BYTES_MAX
from logging_shm.render import ENDPOINT, KINDS, UNICODE_SHOWN, duration, endpoint, printable, real, render, steps
from tests.logging_shm.reading import MAX_I64, MIN_I64, int64s

templates = st.lists(
    st.one_of(
        st.text(max_size=6),
        st.sampled_from(["{", "}", "{}", "{0}", "{0:x}", "{key}", "{other}", "{naïve}", "\\", '"']),
        st.builds("{{{}:{}}}".format, st.integers(0, 9), st.sampled_from([*KINDS, ENDPOINT])),
    ),
    max_size=12,
).map("".join)


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b"plain text", "plain text"),
        ("grüße, 世界".encode(), "grüße, 世界"),
        (b"two\nlines\r\n", r"two\nlines\r\n"),
        (b"\x1b[31mred", r"\x1b[31mred"),
        (b"tab\tnul\0del\x7f", r"tab\tnul\x00del\x7f"),
        (b"\xff\xc3(", r"\xff\xc3("),
        (b"cut \xe4\xb8", r"cut \xe4\xb8"),
        ("\u0085\u2028\u2029".encode(), r"\x85\u2028\u2029"),
        ("\u202eright-to-left override".encode(), r"\u202eright-to-left override"),
        ("\ufeff\u200b".encode(), r"\ufeff\u200b"),
        ("\U00020000".encode(), r"\U00020000"),
        (b"\xed\xa0\x80", r"\xed\xa0\x80"),
    ],
)
def test_what_is_not_printable_is_escaped(raw: bytes, shown: str) -> None:
    assert printable(raw) == shown


@given(st.binary(max_size=MESSAGE_BYTES_MAX))
def test_any_bytes_become_one_printable_line(raw: bytes) -> None:
    shown = printable(raw)
    assert shown.isprintable()
    assert all(ord(character) < UNICODE_SHOWN for character in shown)


@given(st.binary(max_size=MESSAGE_BYTES_MAX))
def test_what_was_made_printable_stays_as_it_is(raw: bytes) -> None:
    shown = printable(raw)
    assert printable(shown.encode()) == shown


@pytest.mark.parametrize(
    ("value_ns", "shown"),
    [
        (0, "0 ns"),
        (999, "999 ns"),
        (-999, "-999 ns"),
        (1000, "1.000 µs"),
        (-1500, "-1.500 µs"),
        (999_999, "999.999 µs"),
        (1_000_000, "1.000 ms"),
        (12_345_678, "12.345 ms"),
        (-1_000_000_000, "-1.000 s"),
        (3_600_000_000_000, "3600.000 s"),
        (MAX_I64, "9223372036.854 s"),
        (MIN_I64, "-9223372036.854 s"),
    ],
)
def test_a_duration_is_told_in_the_greatest_unit_that_it_fills(value_ns: int, shown: str) -> None:
    assert duration(value_ns) == shown


@given(int64s)
def test_a_duration_loses_less_than_a_thousandth_of_its_unit(value_ns: int) -> None:
    number, unit = duration(value_ns).split(" ")
    unit_ns = {"ns": 1, "µs": 1000, "ms": 1_000_000, "s": 1_000_000_000}[unit]
    thousandths = round(float(number) * 1000) if unit_ns > 1 else int(number) * 1000
    assert abs(abs(value_ns) * 1000 - abs(thousandths) * unit_ns) < unit_ns
    assert number.startswith("-") == (value_ns < 0)


@given(st.floats())
def test_a_float_has_six_significant_digits(value: float) -> None:
    (bits,) = struct.unpack("<q", struct.pack("<d", value))
    assert real(bits) == f"{value:g}"


@pytest.mark.parametrize(
    ("placeholder", "value", "shown"),
    [
        ("{0:d}", -5, "-5"),
        ("{0:g}", 0x3FF8_0000_0000_0000, "1.5"),
        ("{0:ip}", 0x0A000007, "10.0.0.7"),
        ("{0:ip}", -1, "255.255.255.255"),
        ("{0:port}", 0x1_1389, "5001"),
        ("{0:dur}", 2_500_000, "2.500 ms"),
        ("{0:hex}", 255, "0xff"),
        ("{0:hex}", -1, "0xffffffffffffffff"),
    ],
)
def test_a_placeholder_shows_an_argument_by_its_kind(placeholder: str, value: int, shown: str) -> None:
    assert render(f"<{placeholder}>", 1, [value], {}) == f"<{shown}>"


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("::ffff:10.0.0.7", "10.0.0.7:5001"),
        ("2001:db8::7", "[2001:db8::7]:5001"),
        ("::", "[::]:5001"),
        ("1:0:0:2::3", "[1:0:0:2::3]:5001"),
        ("fe80:0:1:0:0:1:0:0", "[fe80:0:1::1:0:0]:5001"),
    ],
)
def test_an_endpoint_takes_three_arguments(address: str, shown: str) -> None:
    halves = struct.unpack("<qq", socket.inet_pton(socket.AF_INET6, address))
    assert render("<{1:endpoint}> {4:d}", 1, [0, *halves, 5001, 9], {}) == f"<{shown}> 9"
    assert render("<{1:endpoint}>", 1, [0, *halves], {}) == "<>"


def test_a_placeholder_takes_an_argument_by_its_number_or_a_pair_by_its_key() -> None:
    assert render("{1:d} {0:d} {rule} {1:hex}", 1, [10, 11], {"rule": "tv"}) == "11 10 tv 0xb"


def test_a_placeholder_without_its_argument_or_pair_is_empty() -> None:
    assert render("<{3:d}> <{9:ip}> <{rule}>", 1, [1, 2, 3], {}) == "<> <> <>"


@pytest.mark.parametrize(
    "text", ["{", "}", "{}", "{:d}", "{0:x}", "{0:d", "{10:d}", "{-1:d}", "{a b}", "%d %s", "{{}}"]
)
def test_what_is_no_placeholder_is_shown_as_it_is(text: str) -> None:
    assert render(text, 1, [7], {"a": "b"}) == text


def test_a_pair_s_value_is_not_taken_for_a_placeholder() -> None:
    assert render("{rule}", 1, [7], {"rule": "{0:d}"}) == "{0:d}"


def test_a_format_that_is_not_registered_is_told_by_its_number() -> None:
    assert render(None, 17, [7], {}) == "(format 17 is not registered)"


@given(template=templates, arguments=st.lists(int64s, max_size=8), value=st.text(max_size=20))
def test_a_rendered_message_is_one_printable_line(template: str, arguments: list[int], value: str) -> None:
    assert render(template, 1, arguments, {"key": value}).isprintable()


@given(template=templates, arguments=st.lists(int64s, max_size=8), value=st.text(max_size=20))
def test_steps_taken_one_by_one_say_what_rendering_says(template: str, arguments: list[int], value: str) -> None:
    pairs = {"key": printable(value.encode())}
    said = ""
    for kind, text, argument in steps(template):
        if kind == "literal":
            said += text.decode()
        elif kind == "pair":
            said += pairs.get(text.decode(), "")
        elif kind == ENDPOINT:
            said += endpoint(*arguments[argument:][:3]) if argument + 3 <= len(arguments) else ""
        elif argument < len(arguments):
            said += KINDS[kind](arguments[argument])
    assert said == render(template, 1, arguments, pairs)


@given(templates)
def test_steps_never_hold_an_empty_or_unprintable_literal(template: str) -> None:
    for kind, text, _ in steps(template):
        assert kind in (*KINDS, ENDPOINT) or re.fullmatch(r".+", text.decode())
        assert text.decode().isprintable()
