"""mcrctl's commands on files as far as they need no relay: exit codes, what is printed, JSON."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from relay.cli.mcrctl import main
from tests.relay.test_configfile import FOUND, WRONG

GOOD = """\
interfaces = ["lo"]
[[rules]]
rule_id = "tv-{n}"
input_group = "239.1.1.0/30"
input_port = 5001
outputs = ["239.2.2.0/30:6001:lo"]
"""


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["--socket", "/nowhere/control.sock", *map(str, arguments)])


@pytest.fixture
def wrong(tmp_path: Path) -> Path:
    (tmp_path / "wrong.toml").write_text(WRONG)
    return tmp_path / "wrong.toml"


ONE = '[[rules]]\ninput_group = "239.1.1.1"\ninput_port = 1\noutputs = ["10.0.0.1:1:lo"]\n'


@pytest.fixture
def good(tmp_path: Path) -> Path:
    (tmp_path / "good.toml").write_text(GOOD)
    return tmp_path / "good.toml"


def test_check_prints_a_line_for_each_error(wrong: Path) -> None:
    result = run("config", "check", wrong)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert len(lines) == len(FOUND)
    assert lines[0] == f"{wrong}:1: interfaces: Expected `array`, got `str`"


def test_check_counts_rules_and_tells_of_chains(good: Path) -> None:
    assert run("config", "check", good).stdout == "ok: 4 rules\n"
    good.write_text(ONE)
    assert run("config", "check", good).stdout == "ok: 1 rule\n"
    good.write_text(GOOD + '[[rules]]\ninput_group = "239.2.2.1"\ninput_port = 6001\noutputs = ["10.0.0.1:1:lo"]\n')
    result = run("config", "check", good)
    assert result.exit_code == 0
    assert "warning: rule tv-2 sends what rule r-" in result.stderr


def test_check_answers_in_json(wrong: Path, good: Path) -> None:
    checked = json.loads(run("config", "check", "--json", wrong).stdout)
    assert (checked["ok"], checked["rules"], len(checked["errors"])) == (False, 1, len(FOUND))
    assert checked["errors"][1] == {
        "file": str(wrong),
        "line": 2,
        "key": "num_workers",
        "message": "Expected `int` >= 1",
    }
    assert json.loads(run("config", "check", "--json", good).stdout)["ok"] is True


@pytest.mark.parametrize(("command", "exit_code"), [("check", 1), ("diff", 2), ("apply", 1)])
def test_a_file_that_is_missing_or_wrong_is_an_error_of_the_commands_own(
    wrong: Path, command: str, exit_code: int
) -> None:
    missing = run("config", command, "/nowhere/relay.toml")
    assert missing.exit_code == exit_code
    assert missing.stderr == "mcrctl: /nowhere/relay.toml: No such file or directory: give a readable file\n"
    assert run("config", command, wrong).exit_code == exit_code


@pytest.mark.parametrize(("command", "exit_code"), [("diff", 2), ("apply", 3), ("save", 3)])
def test_without_a_relay_nothing_is_compared(good: Path, command: str, exit_code: int) -> None:
    result = run("config", command, good)
    assert result.exit_code == exit_code
    assert "no relay answers on /nowhere/control.sock" in result.stderr
    assert good.read_text() == GOOD


def test_who_wants_json_is_not_asked(good: Path) -> None:
    result = run("config", "apply", "--json", good)
    assert (result.exit_code, "give --yes, too, or --dry-run" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--input-group", "239.1.1.0/24", "--rule-id", "tv"], "would name all 256 rules: add {group}"),
        (["--input-group", "239.1.1.0/28", "--output", "239.2.0.0/27:1:lo"], "has 32 addresses, the input 16"),
        (["--input-group", "239.1.1.1", "--output-group", "239.2.2.2", "--output-port", "{prt}",
          "--output-interface", "lo"], "no field {prt}; there are {group}, {port}"),
    ],
)  # fmt: skip
def test_ranges_that_make_no_sense_are_refused_before_the_relay_is_asked(options: list[str], message: str) -> None:
    outputs = [] if any(option.startswith("--output") for option in options) else ["--output", "{group}:1:lo"]
    result = run("add-rule", "--input-port", "5001", *options, *outputs)
    assert result.exit_code == 2
    assert message in result.stderr
