"""`mcrctl explain` beside what the relay does: a datagram that would be relayed is, one that would not is not.

gen ──left── relay ──right── sink        10.1.0.0/24, 10.2.0.0/24
"""

import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from click.testing import CliRunner

from relay import api
from relay.cli.mcrctl import main
from relay.client import Client
from tests.system.harness import BIN, Relay, wait_until
from tests.system.test_rules import listener, receive, sender
from tools.netns import Host, Line

IN, OUT = "239.1.1.1:5001", "239.2.2.2:6001:right"
GEN, OTHER = "10.1.0.1", "10.1.0.9"


@pytest.fixture(scope="module")
def line() -> Iterator[Line]:
    """gen ─ relay ─ sink, for all tests of this file."""
    with Line("gen", "relay", "sink") as line:
        line.hosts[0].ip("addr", "add", f"{OTHER}/24", "dev", "right")
        yield line


@pytest.fixture(scope="module")
def relay_of_all(line: Line, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    """A start takes longer than what is asked here."""
    relay = Relay(line.hosts[1], tmp_path_factory.mktemp("relay"), ("left", "lo"))
    yield relay
    relay.kill()


@pytest.fixture
def relay(relay_of_all: Relay) -> Iterator[Relay]:
    """The relay, without rules at the end."""
    yield relay_of_all
    remove_all(relay_of_all)


def ask(relay: Relay, request: api.Request) -> Any:
    """As mcrctl asks, which takes longer to start."""
    with Client(relay.socket) as client:
        return client.ask(request).result


def states(relay: Relay) -> list[str]:
    return [str(rule["state"]) for rule in ask(relay, api.ListRules())]


def remove_all(relay: Relay) -> None:
    ask(relay, api.RemoveRules(tuple(rule["rule_id"] for rule in ask(relay, api.ListRules()))))


def explain(relay: Relay, *arguments: str) -> Any:
    """The answer; the exit status must say the same."""
    result = relay.control("explain", *arguments, "--json")
    assert result.returncode in (0, 1), result.stderr
    answer = json.loads(result.stdout)
    assert result.returncode == (0 if answer["relayed"] else 1)
    return answer


def step(answer: Any, name: str) -> Any:
    return next(step for step in answer["steps"] if step["step"].startswith(name))


@contextmanager
def setting(host: Host, key: str, value: int) -> Iterator[None]:
    former = str(host.run(["sysctl", "-n", key], capture_output=True).stdout).strip()
    assert host.run(["sysctl", "-qw", f"{key}={value}"]).returncode == 0
    yield
    host.run(["sysctl", "-qw", f"{key}={former}"])


def relayed(line: Line, relay: Relay, cases: Sequence[tuple[str, str, int]]) -> set[int]:
    """Which of these datagrams the relay sends on; one of `tv` behind them proves that it has had its turn."""
    gen, _, sink = line.hosts
    arrived = set()
    before = ask(relay, api.GetStats())["packets_relayed"]
    with listener(sink, "239.2.2.2", 6001) as sock:
        for number, (source, group, port) in enumerate([*cases, (GEN, "239.1.1.1", 5001)]):
            with sender(gen) as out:
                out.bind((source, 0))
                out.sendto(bytes([number]), (group, port))
        while len(cases) not in arrived:
            arrived.add(receive(sock)[0][0])
        wait_until(lambda: ask(relay, api.GetStats())["packets_relayed"] - before >= len(arrived), "all are counted")
        while (
            len(arrived) < ask(relay, api.GetStats())["packets_relayed"] - before
        ):  # outputs of two rules may leave in any order
            arrived.add(receive(sock)[0][0])
    return arrived - {len(cases)}


def test_the_verdict_is_what_the_relay_does(line: Line, relay: Relay) -> None:
    relay.add("tv", IN, OUT)
    relay.add("picky", "239.1.1.2:5001", OUT, options=("--source", OTHER))
    cases = [
        (GEN, "239.1.1.1", 5001),
        (OTHER, "239.1.1.2", 5001),
        (GEN, "239.1.1.1", 5002),
        (GEN, "239.1.1.3", 5001),
        (GEN, "239.1.1.2", 5001),
    ]
    really = relayed(line, relay, cases)
    answers = [explain(relay, source, f"{group}:{port}") for source, group, port in cases]
    assert {number for number, answer in enumerate(answers) if answer["relayed"]} == really == {0, 1}
    assert "the nearest is tv, which differs in port: it takes 5001" in answers[2]["summary"]
    assert "which differs in group: it takes 239.1.1." in answers[3]["summary"]
    assert f"the nearest is picky, which differs in source: it takes only {OTHER}" in answers[4]["summary"]
    assert step(answers[2], "filter")["verdict"] == "stop"
    counted = [answer for answer in answers if "counted as no_match" in answer["summary"]]
    assert counted == [answers[4]]  # of the right group and port, so the filter admits it
    assert ask(relay, api.GetStats())["drops"]["no_match"] == len(counted)
    assert all(step(answer, "rule")["remedy"] for answer in answers[2:])
    assert step(answers[1], "join")["reason"] == f"239.1.1.2 is joined on left for {OTHER}"
    output = step(answers[1], "output")["reason"]
    assert "leaves right to 239.2.2.2:6001 from 10.2.0.1 with TTL 1; payloads over 1472 bytes" in output
    assert "has matched 1, relayed 1, dropped 0" in step(answers[1], "counters")["reason"]
    # From outside of the relay's network namespace, which is entered.
    command = [str(BIN / "mcrctl"), "--socket", str(relay.socket), "explain", GEN, IN]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (
        "left is up, and the relay takes in from it; assumed, as 10.1.0.1 is in its network 10.1.0.0/24"
        in result.stdout
    )
    assert "would be relayed by tv through 1 of 1 outputs" in result.stdout


def test_each_obstacle_is_found(line: Line, relay: Relay) -> None:
    _, host, _ = line.hosts
    relay.add("tv", IN, OUT, "10.2.0.2:6002:right:9")
    wrong = explain(relay, GEN, IN, "--interface", "right")
    assert "the relay takes nothing in from right: it does from left, lo" in wrong["summary"]
    assert "--interface right" in step(wrong, "interface")["remedy"]

    relay.add("hops", "239.1.1.8:5001", f"{OUT}:decrement")
    assert explain(relay, GEN, "239.1.1.8:5001", "--ttl", "2")["relayed"]
    assert "comes with TTL 1" in explain(relay, GEN, "239.1.1.8:5001", "--ttl", "1")["summary"]

    own = explain(relay, "10.1.0.2", IN)
    assert "10.1.0.2 is this host's own address" in own["summary"]

    host.ip("link", "set", "right", "down")
    wait_until(lambda: "waiting" in states(relay)[0], "the rule waits")
    waiting = explain(relay, GEN, IN)
    assert "waiting: interface right is down" in waiting["summary"]
    assert step(waiting, "output")["remedy"] == "ip link set right up"
    host.ip("link", "set", "left", "down")
    wait_until(lambda: "left" in states(relay)[0], "the rule waits for left")
    down = explain(relay, GEN, IN, "--interface", "left")
    assert down["summary"].endswith("interface left is down")
    assert step(down, "interface")["remedy"] == "ip link set left up"
    for name in ("left", "right"):
        host.ip("link", "set", name, "up")
    wait_until(lambda: states(relay)[0] == "active", "the rule is back")


def test_a_join_that_the_kernel_refused_is_found(line: Line, relay: Relay) -> None:
    with setting(line.hosts[1], "net.ipv4.igmp_max_memberships", 0):
        relay.add("refused", "239.1.1.7:5001", OUT)
        refused = explain(relay, GEN, "239.1.1.7:5001")
    assert "239.1.1.7 is not joined on left (igmp_max_memberships is 0)" in refused["summary"]
    assert "sysctl net.ipv4.igmp_max_memberships=20" in step(refused, "join")["remedy"]


def test_what_the_relay_sent_itself_is_told_from_what_others_send(line: Line, relay: Relay) -> None:
    host = line.hosts[1]
    relay.add("first", IN, "239.1.1.2:5001:lo")
    relay.add("second", "239.1.1.2:5001", "239.1.1.3:5001:lo")
    udp = str(host.run(["cat", "/proc/net/udp"], capture_output=True).stdout)
    (port,) = [int(words.split()[1].split(":")[1], 16) for words in udp.splitlines() if "020101EF:1389" in words]
    unsure = explain(relay, "127.0.0.1", "239.1.1.2:5001")
    assert unsure["relayed"]
    assert step(unsure, "own egress")["verdict"] == "note"
    own = explain(relay, f"127.0.0.1:{port}", "239.1.1.2:5001")
    assert "what it sent itself is dropped as own_egress" in own["summary"]
    assert explain(relay, f"127.0.0.1:{port % 60_000 + 1}", "239.1.1.2:5001")["relayed"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("10.0.0", IN), "source '10.0.0': '10.0.0' is not an IPv4 address"),
        (("10.0.0.7", "239.1.1.1"), "destination '239.1.1.1': give a port from 1 to 65535 behind a colon"),
        (("10.0.0.7:x", IN), "source '10.0.0.7:x': give a port"),
    ],
)
def test_a_wrong_question_is_one_line(arguments: tuple[str, str], message: str) -> None:
    result = CliRunner().invoke(main, ["explain", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
