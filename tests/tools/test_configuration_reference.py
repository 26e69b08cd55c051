"""docs/configuration.md says what the typed definition says, and its examples are right."""

import re

import pytest

from relay.configfile import check_together, examine
from relay.rules import output_name
from tools.configuration_reference import PAGE, page

TEXT = PAGE.read_text()
EXAMPLES = re.findall(r"^```toml\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_the_page_is_what_the_generator_makes() -> None:
    assert page(TEXT) == TEXT, "run `python -m tools.configuration_reference`"


@pytest.mark.parametrize(("example", "rules"), list(zip(EXAMPLES, (1, 1024, 11, 100), strict=True)))
def test_examples_are_right(example: str, rules: int) -> None:
    examined = examine(example, "example")
    check_together(examined)
    assert examined.findings == []
    assert len(examined.rules) == rules


def test_rules_of_a_range_are_those_that_the_page_names() -> None:
    rules = examine(EXAMPLES[1], "example").rules
    assert [rules[index].rule_id for index in (0, 1, -1)] == re.findall(r"`(cam-239\.1\.1\.\d+-\d+)`", TEXT)
    assert (rules[2].input_port, output_name(rules[2].outputs[0])) == (5002, "239.2.1.0:6002:eth1")


def test_fields_are_what_the_page_says() -> None:
    rows = re.findall(r"^\| (`\{.*) \| .* \| (`.*) \|$", TEXT, re.MULTILINE)
    assert len(rows) == 5
    for fields, values in rows:
        names, expected = re.findall(r"\{[^}]+\}", fields), re.findall(r"`([^`]+)`", values)
        entry = f'[[rules]]\nrule_id = "r{":".join(names)}"\ninput_group = "239.1.4.7"\ninput_port = "5000-5002"\n'
        needed = "" if names[0] in ("{port}", "{n}", "{port+1000}") else "-{n}"
        entry = entry.replace('"\ninput_group', f'{needed}"\ninput_group') + 'outputs = ["10.0.0.1:1:lo"]\n'
        third = examine(entry, "example").rules[2].rule_id.removesuffix("-3")
        assert third == "r" + ":".join(expected)
