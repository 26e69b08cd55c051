"""The configuration file: what is read, and how errors name the line, the key and what is allowed."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.config import merge, parse_cores, socket_path
from relay.configfile import parse, read
from relay.errors import ConfigError, UsageError

RULE = """
[[rules]]
input_group = "239.1.1.1"
input_port = 5001
outputs = ["239.2.2.2:6001:lo", { group = "10.0.0.7", port = 6001, interface = "lo", dscp = 34 }]
"""


def test_options_and_rules_are_read() -> None:
    options, rules = parse('interfaces = ["lo"]\nnum_workers = 2\n' + RULE, "relay.toml")
    assert options == {"interfaces": ("lo",), "num_workers": 2}
    (rule,) = rules
    assert rule.rule_id.startswith("r-")
    assert [output.dscp for output in rule.outputs] == [None, 34]


def test_an_interface_that_is_given_twice_is_one() -> None:
    """Each would be asked for its datagrams, and each would relay them."""
    assert merge({}, {"interfaces": ("a", "b", "a")}).interfaces == ("a", "b")


def test_an_instance_that_can_not_be_has_no_socket() -> None:
    with pytest.raises(UsageError, match="give 1 to 24 letters"):
        socket_path(None, "a/b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\nnum_worker = 1\n", r"relay.toml:2: num_worker: unknown key; allowed are interfaces, num_workers"),
        ("ring_mib = 0\n", r"relay.toml:1: ring_mib: Expected `int` >= 1"),
        ('idle = "often"\n', r"relay.toml:1: idle: .*allowed are adaptive, sleep, spin"),
        ('instance = "a/b"\n', r"relay.toml:1: instance"),
        (RULE + "ttl = 1\n", r"relay.toml:6: rules\[0\].ttl: unknown key; allowed are rule_id"),
        (RULE + RULE.replace("5001", "true"), r"relay.toml:9: rules\[1\].input_port: Expected `int"),
        (RULE.replace("239.1.1.1", "fe80::1"), r"relay.toml:3: rules\[0\].input_group: input group fe80::1 is IPv6"),
        (RULE + RULE, r"relay.toml:7: rules\[1\]: rule id .* is given twice"),
        ("interfaces = [\n", r"relay.toml:2: not valid TOML"),
    ],
)
def test_errors_name_the_line_the_key_and_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(text, "relay.toml")


@given(st.text(max_size=200))
def test_no_text_fails_otherwise(text: str) -> None:
    try:
        parse(text, "relay.toml")
    except ConfigError as error:
        assert "relay.toml" in str(error)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.toml"):
        read(tmp_path / "nothing.toml")


def test_the_command_line_goes_before_the_file() -> None:
    options = merge({"interfaces": ("a",), "idle": "spin"}, {"interfaces": (), "idle": "sleep", "user": None})
    assert (options.interfaces, options.idle) == (("a",), "sleep")


@pytest.mark.parametrize(
    ("command_line", "message"),
    [
        ({}, "no interface: give --interface"),
        ({"interfaces": ("lo",), "num_workers": 0}, "num_workers"),
        ({"interfaces": ("lo",), "instance": "dp"}, "reserved name"),
    ],
)
def test_a_wrong_command_line_is_refused(command_line: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        merge({}, command_line)


def test_what_a_file_says_is_no_wrong_command_line() -> None:
    with pytest.raises(ConfigError, match="reserved name"):
        merge({"instance": "dp"}, {"interfaces": ("lo",)})


@pytest.mark.parametrize(("text", "cores"), [("2", (2,)), ("2,4-7", (2, 4, 5, 6, 7)), ("3,1", (3, 1))])
def test_core_lists(text: str, cores: tuple[int, ...]) -> None:
    assert parse_cores(text) == cores


@pytest.mark.parametrize("text", ["", "a", "4-2", "1,1", "1-", "9999", "0-2,1"])
def test_wrong_core_lists_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="cores"):
        parse_cores(text)


def test_the_control_socket_follows_the_instance() -> None:
    assert socket_path(None, None) == Path("/run/mcr/control.sock")
    assert socket_path(None, "tv") == Path("/run/mcr/tv.sock")
    assert socket_path("/tmp/x.sock", "tv") == Path("/tmp/x.sock")
