"""A configuration file and the running relay: compared, applied under traffic, saved.

gen ──left── relay ──right── sink        10.1.0.0/24, 10.2.0.0/24
"""

import json
import os
import pty
import signal
from pathlib import Path
from subprocess import PIPE
from typing import Any

import psutil
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from jsonschema import Draft202012Validator

from relay.cli.config import change_to, find_differences, running_rules, started_with
from relay.cli.mcrctl import main
from relay.client import Client
from relay.configfile import examine
from relay.dataplane.counters import StatsSegment
from relay.errors import ControlError
from relay.rules import Rule
from relay.saving import written
from relay.schema import ANSWERS, of_answer
from tests.relay.test_differences import RULE_SETS
from tests.system.conftest import StartRelay
from tests.system.harness import BIN, SERVES, Relay, assert_perfect, receiver, send, sender, wait_until
from tools.netns import Line

RATE = "3000"


def forward(number: int, group: str, second: str | None = None) -> str:
    """A rule from gen to sink as an entry of a file; the second output goes nowhere that is looked at."""
    outputs = [f'"{group}:6001:right"', *([f'"{second}:6001:right"'] if second else [])]
    return f"""
[[rules]]
rule_id = "forward-{number}"
input_group = "239.1.1.{number}"
input_port = 5001
input_interface = "left"
outputs = [{", ".join(outputs)}]
"""


BACK = """
[[rules]]
rule_id = "back-{n}"
input_group = "239.3.1.1-239.3.1.15"
input_port = 5001
input_interface = "right"
outputs = ["239.4.1.{g4}:6001:left"]
"""


def before_and_after() -> tuple[str, str]:
    """Fifty rules, fifteen of them back; then 10 are gone, 10 are new, 10 have another second output."""
    kept = "".join(forward(i, f"239.2.1.{i}") for i in range(1, 16))
    before = (forward(i, f"239.2.1.{i}", f"239.9.1.{i}") for i in range(16, 26))
    after = (forward(i, f"239.2.1.{i}", f"239.9.2.{i}") for i in range(16, 26))
    removed = (forward(i, f"239.2.1.{i}") for i in range(26, 36))
    added = (forward(i, f"239.2.1.{i}") for i in range(36, 46))
    return kept + "".join((*before, *removed)) + BACK, kept + "".join((*added, *after)) + BACK


def control(relay: Relay, *arguments: str) -> Result:
    """Run mcrctl within this process, which takes a tenth of the time."""
    return CliRunner().invoke(main, ["--socket", str(relay.socket), *arguments])


def ask(relay: Relay, *arguments: str) -> Any:
    result = control(relay, *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def relayed(relay: Relay) -> int:
    return int(ask(relay, "get-stats")["packets_relayed"])


def tables_used(relay: Relay) -> int:
    """The generation of the rule table that the worker uses: each change makes one more."""
    stats = StatsSegment.attach(relay.cores(1)[0], relay.instance)
    try:
        return int(stats.header["generation_seen"])
    finally:
        stats.close()


@pytest.fixture
def relay(line: Line, start_relay: StartRelay) -> Relay:
    return start_relay(line.hosts[1], ("left", "right"), 1)


def of_flows(group: str, flows: int) -> tuple[str, ...]:
    return ("--flows", str(flows), "--flow-by", "group", "--group", group)


def test_a_file_is_applied_under_traffic_and_what_it_leaves_alone_notices_nothing(
    line: Line, relay: Relay, tmp_path: Path
) -> None:
    gen, _, sink = line.hosts
    file = tmp_path / "relay.toml"
    before, after = before_and_after()
    file.write_text(before)
    ask(relay, "config", "apply", "--yes", str(file))
    assert len(ask(relay, "list-rules")) == 50
    forward_to = (*of_flows("239.2.1.1", 25), "--port", "6001", "--interface", "left")
    back_to = (*of_flows("239.4.1.1", 15), "--port", "6001", "--interface", "right")
    forward_from = (*of_flows("239.1.1.1", 25), "--interface", "right")
    back_from = (*of_flows("239.3.1.1", 15), "--interface", "left")
    pace = ("--rate", RATE, "--size", "200")
    with (
        receiver(sink, tmp_path, *forward_to) as forwarded,
        receiver(gen, tmp_path, *back_to) as came_back,
        sender(gen, tmp_path, *forward_from, *pace) as forward_sent,
        sender(sink, tmp_path, *back_from, *pace) as back_sent,
    ):
        wait_until(lambda: relayed(relay) > 1000, "streams flow")
        listed = ask(relay, "list-rules")
        refuse_bad_files(relay, file, after)
        assert ask(relay, "list-rules") == listed
        file.write_text(after)
        before_it = tables_used(relay)
        applied = relay.ask("config", "apply", "--yes", str(file))
        assert tables_used(relay) == before_it + 1
        before_more = relayed(relay)
        wait_until(lambda: relayed(relay) > before_more + 1000, "streams flow on")
        sent = [tool.interrupt()["datagrams"] for tool in (forward_sent, back_sent)]
        assert_perfect(forwarded.drain(), sent[0])
        assert_perfect(came_back.drain(), sent[1])
    differences = applied["differences"]
    assert [len(differences[what]) for what in ("added", "removed", "changed")] == [10, 10, 10]
    assert {len(change["fields"]) for change in differences["changed"]} == {2}  # an output came, another went
    assert control(relay, "config", "diff", str(file)).exit_code == 0
    assert sum(ask(relay, "get-stats")["drops"].values()) == 0
    relay.stop()


def refuse_bad_files(relay: Relay, file: Path, good: str) -> None:
    """One rule of a file is wrong, which is seen before anything is asked, or by the relay alone."""
    for wrong, option, message in (
        ('input_port = 0\noutputs = ["239.2.2.2:1:right"]', "--yes", "give a port from 1 to 65535"),
        ('input_port = 1\noutputs = ["239.2.2.2:1:nowhere"]', "--yes", "no interface nowhere: this host has"),
        ('input_port = 1\noutputs = ["239.7.1.1:1:right"]', "--dry-run", "equals its input on the same interface"),
    ):
        file.write_text(f'{good}\n[[rules]]\nrule_id = "bad"\ninput_group = "239.7.1.1"\n{wrong}\n')
        result = control(relay, "config", "apply", option, str(file))
        assert (result.exit_code, message in result.stderr) == (1, True), result.stderr


SIX_LINES = """\
[[rules]]
rule_id = "cam-{group}-{port}"
input_group = "239.1.0.0-239.1.0.99"
input_port = "5000-5099"
input_interface = "left"
outputs = ["239.2.{g3}.{g4}:{port+1000}:right"]
"""


def test_ten_thousand_rules_of_six_lines_are_applied_and_match(line: Line, relay: Relay, tmp_path: Path) -> None:
    gen, _, sink = line.hosts
    file = tmp_path / "relay.toml"
    file.write_text(SIX_LINES)
    ask(relay, "config", "apply", "--yes", str(file))
    assert control(relay, "config", "diff", str(file)).stdout == "the rules are the same\n"
    assert ask(relay, "config", "save", str(file)) == {
        "file": str(file),
        "rules": 10_000,
        "is_changed": False,
        "warnings": [],
    }
    to = ("--group", "239.2.0.99", "--port", "6099", "--interface", "left")
    with receiver(sink, tmp_path, *to) as received:
        send(gen, "--interface", "right", "--group", "239.1.0.99", "--port", "5099", "--rate", "2000", "--count", "500")
        assert_perfect(received.drain(500), 500)


def converge_at_random(relay: Relay) -> None:
    """Whatever rules there are, after a file was applied nothing differs from it."""

    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(RULE_SETS)
    def converges(wanted: list[Rule]) -> None:
        here = [on_this_host(rule) for rule in wanted]
        examined = examine("\n".join(map(written, here)), "random")
        assert examined.findings == []
        running = running_rules(client)
        change = change_to(find_differences(running, started, examined), running, examined, is_configuration=False)
        client.ask(change)
        differences = find_differences(running_rules(client), started, examined)
        assert differences.of_rules == 0

    with Client(relay.socket) as client:
        started = started_with(client)
        converges()


def on_this_host(rule: Rule) -> Rule:
    """The rule on interfaces that this host has."""
    text = written(rule).replace("eth0", "left").replace("eth1", "right").replace("eth2", "lo")
    (made,) = examine(text, "rule").rules
    return made


RULE = """
[[rules]]
rule_id = "{0}"
input_group = "239.1.1.1"
input_port = 5001
outputs = ["{1}:6001:right"]
"""


def ids(relay: Relay) -> list[str]:
    return sorted(rule["rule_id"] for rule in ask(relay, "list-rules"))


def replace_control_plane(relay: Relay) -> None:
    served = relay.text().count(SERVES)
    (process,) = [
        child for child in psutil.Process(relay.pid).children() if "relay.controlplane" in " ".join(child.cmdline())
    ]
    process.kill()
    wait_until(lambda: relay.text().count(SERVES) > served, "the next control plane serves")


def apply_and_answer(relay: Relay, file: Path, answer: str) -> int:
    """Apply a file at a terminal where somebody answers; return the exit code."""
    terminal, its_end = pty.openpty()
    try:
        os.write(terminal, f"{answer}\n".encode())
        command = [str(BIN / "mcrctl"), "--socket", str(relay.socket), "config", "apply", str(file)]
        return relay.host.run(command, stdin=its_end, capture_output=True).returncode
    finally:
        os.close(terminal)
        os.close(its_end)


def test_the_file_that_the_relay_reads_and_what_is_made_of_it(
    line: Line, start_relay: StartRelay, tmp_path: Path
) -> None:
    file, other = tmp_path / "relay.toml", tmp_path / "other.toml"
    file.write_text(
        'interfaces = ["left"]\nring_mib = 8\n' + RULE.format("a", "239.2.2.1") + RULE.format("b", "239.2.2.2")
    )
    relay = start_relay(line.hosts[1], ("left",), 1, "--config", str(file))
    wait_until(lambda: ids(relay) == ["a", "b"], "rules of the file")
    assert control(relay, "config", "diff", str(file)).exit_code == 0  # --ring-mib goes before the file's
    relay.add("extra", "239.1.1.2:5001", "239.2.2.3:6001:right")

    file.write_text('idle = "spin"\nring_mib = 9\n' + RULE.format("a", "239.2.2.9"))
    differences = control(relay, "config", "diff", str(file))
    assert differences.exit_code == 1
    assert differences.stdout.splitlines() == [
        "- rule b: 239.1.1.1:5001 -> 239.2.2.2:6001:right",
        "- rule extra: 239.1.1.2:5001 -> 239.2.2.3:6001:right",
        "~ rule a",
        "    - output 239.2.2.1:6001:right",
        "    + output 239.2.2.9:6001:right",
        '! idle: "adaptive" -> "spin", after a restart',
        "rules: 0 added, 2 removed, 1 changed; options that take effect at a restart: 1",
    ]
    assert ask(relay, "config", "apply", "--dry-run", str(file))["applied"] is False
    refused = control(relay, "config", "apply", str(file))
    assert (refused.exit_code, refused.stderr.startswith("mcrctl: nobody can be asked here: give --yes")) == (1, True)
    assert apply_and_answer(relay, file, "n") == 1
    assert ids(relay) == ["a", "b", "extra"]
    assert apply_and_answer(relay, file, "y") == 0
    assert ids(relay) == ["a"]

    replace_control_plane(relay)
    assert ids(relay) == ["a"]  # not what the file was at the start
    file.write_text(RULE.format("c", "239.2.2.1"))
    relay.process.send_signal(signal.SIGHUP)
    wait_until(lambda: ids(relay) == ["c"], "the applied rule went, as it is in the file no more")

    other.write_text(RULE.format("d", "239.2.2.1"))
    noted = control(relay, "config", "apply", "--yes", str(other))
    assert (noted.exit_code, ids(relay)) == (0, ["d"])
    assert f"the relay reads {file} at SIGHUP and at a restart, not {other}" in noted.stderr
    replace_control_plane(relay)
    assert ids(relay) == ["d"]
    relay.stop()


def test_a_change_is_made_whoever_reads_what_is_printed(relay: Relay, tmp_path: Path) -> None:
    """The reader of its output is gone, as of `| head -1`; the output's disk is full; nobody reads errors, either."""
    file = tmp_path / "relay.toml"
    nobody, pipe = os.pipe()
    os.close(nobody)
    with os.fdopen(pipe, "w") as closed, Path("/dev/full").open("w") as full:
        for rule_id, output, errors in (("gone", closed, PIPE), ("full", full, PIPE), ("both", closed, closed)):
            file.write_text(RULE.format(rule_id, "239.2.2.1"))
            command = [str(BIN / "mcrctl"), "--socket", str(relay.socket), "config", "apply", "--yes", str(file)]
            result = relay.host.run(command, stdout=output, stderr=errors)
            assert (result.returncode, ids(relay)) == (0, [rule_id])
            no_room = "mcrctl: standard output: No space left on device: not all that was done could be told\n"
            assert result.stderr == {"gone": "", "full": no_room, "both": None}[rule_id]


def test_a_change_made_for_other_rules_is_refused_and_others_converge(relay: Relay) -> None:
    examined = examine(RULE.format("a", "239.2.2.1"), "a")
    with Client(relay.socket) as client:
        running = running_rules(client)
        change = change_to(find_differences(running, started_with(client), examined), running, examined, False)
        relay.add("meanwhile", "239.1.1.9:5001", "239.2.2.9:6001:right")
        with pytest.raises(ControlError, match="the rules have changed since they were compared"):
            client.ask(change)
    assert ids(relay) == ["meanwhile"]
    converge_at_random(relay)


def strictly(schema: Any) -> Any:
    """The schema, but that no object has keys which it does not name: here it is to name them all."""
    if isinstance(schema, list):
        return [strictly(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {"additionalProperties": False} if "properties" in schema else {}
    return {**closed, **{key: strictly(part) for key, part in schema.items()}}


def test_answers_of_every_command_are_as_their_schema_says(relay: Relay, tmp_path: Path) -> None:
    file = tmp_path / "relay.toml"
    file.write_text('idle = "spin"\n' + RULE.format("tv", "239.2.2.9") + RULE.format("new", "239.2.2.1"))
    rule = ("--input-group", "239.1.1.1", "--input-port", "5001", "--output")
    protected = ("--secondary", "239.1.1.2:5001", "--protection", "seamless")
    ask(relay, "add-rule", "--rule-id", "gone", *protected, *rule, "239.2.2.3:6001:right:decrement")
    commands = {
        "add-rule": ("--rule-id", "tv", *rule, "239.2.2.2:6001:right", "--dscp", "34"),
        "list-rules": (),
        "get-stats": (),
        "list-workers": (),
        "ping": (),
        "streams": (),
        "explain": ("10.1.0.1", "239.1.1.1:5001"),
        "doctor": ("--seconds", "0.1"),
        "log-level get": (),
        "log-level set": ("info",),
        "config check": (str(file),),
        "config diff": (str(file),),
        "config apply": (str(file), "--yes"),
        "config save": (str(file),),
        "remove-rule": ("tv",),
    }
    assert set(commands) == set(ANSWERS)
    for command, arguments in commands.items():
        result = control(relay, *command.split(), "--json", *arguments)
        assert result.exit_code == 0 or command in ("config diff", "explain", "doctor"), result.stderr  # a verdict
        Draft202012Validator(strictly(of_answer(command))).validate(json.loads(result.stdout))
