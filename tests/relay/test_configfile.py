"""A configuration file examined: everything that is wrong is found at once, where it stands."""

import contextlib
from typing import Any

import pytest
import tomlkit
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.config import Options
from relay.configfile import check_together, examine, parse
from relay.errors import ConfigError
from relay.ranges import ConfiguredOutput, ConfiguredRule
from relay.rules import validate

WRONG = """\
interfaces = "eth0"
num_workers = 0
colour = "red"
idle = "often"
cores = "4-2"
log_to = ["ftp://x"]
instance = "dp"

[[rules]]
rule_id = "a b"
input_group = "300.1.1.1"
input_port = 0
outputs = [
    "239.2.2.2:6001",
    "239.2.2.2:0:eth1",
    { group = "1.2.3.4", port = 70000, interface = "a/b", dscp = 99 },
    { group = "1.2.3.4", prt = 7 },
    7,
]
source = "239.1.1.1"

[[rules]]
input_group = "239.1.1.1"

[[rules]]
rule_id = "loop"
input_group = "239.1.9.1"
input_port = 4999
input_interface = "eth1"
outputs = ["239.1.9.1:4999:eth1"]

[[rules]]
rule_id = "loop"
input_group = "239.1.9.2"
input_port = 4999
outputs = ["239.1.9.1:4999:eth1"]
"""
FOUND = [
    (1, "interfaces", "Expected `array`, got `str`"),
    (2, "num_workers", "Expected `int` >= 1"),
    (3, "colour", "unknown key; allowed are interfaces, num_workers"),
    (4, "idle", "allowed are adaptive, sleep, spin"),
    (5, "cores", "4-2 is no range of cores"),
    (6, "log_to", "expected one of stdout:"),
    (7, "instance", "reserved name: choose another"),
    (10, "rules[0].rule_id", "up to 64 letters"),
    (11, "rules[0].input_group", "is not an address such as 239.1.1.1 or ff3e"),
    (12, "rules[0].input_port", "give a port from 1 to 65535"),
    (14, "rules[0].outputs[0]", "expected GROUP:PORT:INTERFACE"),
    (15, "rules[0].outputs[1]", "give a port from 1 to 65535"),
    (16, "rules[0].outputs[2].interface", "give an interface's name"),
    (16, "rules[0].outputs[2].port", "give a port from 1 to 65535"),
    (16, "rules[0].outputs[2].dscp", "give a number from 0 to 63"),
    (17, "rules[0].outputs[3].prt", "unknown key; allowed are group, port"),
    (17, "rules[0].outputs[3]", "port is missing"),
    (17, "rules[0].outputs[3]", "interface is missing"),
    (18, "rules[0].outputs[4]", "Expected `str | table`, got `int`"),
    (20, "rules[0].source", "give a sender's unicast address"),
    (22, "rules[1]", "input_port is missing"),
    (22, "rules[1]", "outputs is missing"),
    (25, "rules[2]", "an output equals its input on the same interface"),
    (32, "rules[3]", "rule id loop is given twice, here and in rules[2]"),
]


def test_everything_that_is_wrong_is_found_at_once_with_its_line() -> None:
    examined = examine(WRONG, "relay.toml")
    check_together(examined)
    assert [(f.line, f.key) for f in examined.findings] == [(line, key) for line, key, _ in FOUND]
    for finding, (_, _, message) in zip(examined.findings, FOUND, strict=True):
        assert message in finding.message
        assert str(finding).startswith(f"relay.toml:{finding.line}: {finding.key}: ")


def test_a_start_is_told_the_first_error_and_how_many_more() -> None:
    with pytest.raises(ConfigError, match=r"relay.toml:1: interfaces: .* \(and \d+ more: `mcrctl config check` shows"):
        parse(WRONG, "relay.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = [\n1,\n", r"^f:3: not valid TOML, end of document: "),
        ("a = 1\na = 2\n", r"^f:2: not valid TOML, column 6: Cannot overwrite"),
        ("a = " + "[" * 9999, r"^f: nested too deep"),
        ("rules = 7\n", r"^f:1: rules: Expected `array`, got `int`"),
        ("rules = [7]\n", r"^f:1: rules\[0\]: Expected `table`, got `int`"),
        (
            '[[rules]]\ninput_group = ["a"]\ninput_port = 1\noutputs = []\n',
            r"^f:2: rules\[0\].input_group: Expected `str`",
        ),
    ],
)
def test_what_is_no_configuration_at_all_is_refused_with_a_place(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(text, "f")


def test_a_cycle_through_several_rules_is_shown_at_one_of_them() -> None:
    rule = '[[rules]]\nrule_id = "r{0}"\ninput_group = "239.1.1.{0}"\ninput_port = 1\noutputs = ["239.1.1.{1}:1:lo"]\n'
    examined = examine('interfaces = ["lo"]\n' + rule.format(1, 2) + rule.format(2, 1), "f")
    assert examined.findings == []
    check_together(examined)
    assert "f:2: rules[0]: cycle through rules r1 -> r2 -> r1" in str(examined.findings[0])


def test_a_right_file_gives_only_what_it_sets() -> None:
    examined = examine('interfaces = ["lo"]\nring_mib = 16\n', "f")
    check_together(examined)
    assert (examined.options, examined.findings) == ({"interfaces": ("lo",), "ring_mib": 16}, [])
    assert Options(**examined.options) == Options(interfaces=("lo",))


WORDS = """lo 239.1.1.1 239.1.1.0/30 239.1.1.9-239.1.1.2 10.0.0.1 5000-5001 {n} x-{group} {port+1} 239.2.2.2:1:lo
{group}:{port}:lo:decrement 239.2.2.0/30:1-2:lo 239.2.2.2:{x}:lo spin 2,4-7"""
TEXTS = st.sampled_from(["", *WORDS.split()])
SCALARS = TEXTS | st.integers(-1, 70_000) | st.booleans() | st.floats(allow_nan=False) | st.datetimes()
TABLES = st.dictionaries(st.sampled_from([*ConfiguredOutput.__struct_fields__, "x"]), SCALARS, max_size=6)
OUTPUTS = st.lists(SCALARS | TABLES, max_size=3)
RULES = st.dictionaries(
    st.sampled_from([*ConfiguredRule.__struct_fields__, "x"]), SCALARS | OUTPUTS | TABLES, max_size=8
) | st.fixed_dictionaries(
    {
        "rule_id": TEXTS,
        "input_group": TEXTS,
        "input_port": TEXTS | st.integers(1, 9),
        "outputs": st.lists(TEXTS, max_size=3),
    }
)
DOCUMENTS = st.dictionaries(st.sampled_from([*Options.__struct_fields__, "x"]), SCALARS | OUTPUTS, max_size=4)


@settings(max_examples=300)
@given(DOCUMENTS, st.lists(RULES | SCALARS, max_size=4) | SCALARS)
def test_whatever_stands_in_a_file_is_right_or_has_a_finding_with_its_line(options: dict[str, Any], rules: Any) -> None:
    text = tomlkit.dumps({**options, "rules": rules})
    examined = examine(text, "f")
    check_together(examined)
    for finding in examined.findings:
        assert finding.line is not None
        assert finding.key
        assert finding.message
    if not examined.findings:
        assert set(examined.options) == set(options)
        assert all(validate(rule) for rule in examined.rules)
        assert len({entry.index for entry in examined.entries}) == len(rules)
    else:
        with contextlib.suppress(ConfigError):
            parse(text, "f")
            assert all("cycle" in str(f) or "loop" in str(f) or f.key in ("cores", "log_to") for f in examined.findings)
