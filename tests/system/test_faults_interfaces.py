"""Interfaces that go, come back under other names and addresses: rules wait and return by themselves.

gen ──left── relay ══right, spare══ sink        10.1.0.0/24, 10.2.0.0/24, 10.3.0.0/24
"""

import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.conftest import StartRelay
from tests.system.harness import Relay, assert_perfect, receiving, send, wait_until
from tests.system.test_rules import listener, receive, sender
from tools.netns import Host, Line, connect

PPS = 50_000
COUNT = 150_000
IN, OUT = "239.1.1.1:5001", "239.2.2.1:6001:right"
STEADY_IN, STEADY_OUT = "239.1.1.2:5001", "239.2.2.2:6001:spare"


@pytest.fixture
def relay(line: Line, start_relay: StartRelay) -> Relay:
    """Two rules: one for the interfaces that suffer, one that has nothing to do with them."""
    gen, host, sink = line.hosts
    connect(host, "spare", "10.3.0.1/24", sink, "spare", "10.3.0.2/24")
    connect(gen, "second", "10.4.0.1/24", host, "second", "10.4.0.2/24")
    relay = start_relay(host, ("left", "second"), 1, "--ring-mib", "64")
    relay.add("r", IN, OUT, options=("--input-interface", "left"))
    relay.add("steady", STEADY_IN, STEADY_OUT, options=("--input-interface", "second"))
    return relay


def state(relay: Relay) -> str:
    return next(str(rule["state"]) for rule in relay.ask("list-rules") if rule["rule_id"] == "r")


def relays(line: Line, address: str) -> bool:
    """Whether the rule relays now, from this source address."""
    gen, _, sink = line.hosts
    with sender(gen) as out, listener(sink, "239.2.2.1", 6001) as sock:
        out.sendto(b"payload", ("239.1.1.1", 5001))
        payload, source, _, _ = receive(sock)
    return (payload, source) == (b"payload", address)


def go_down(host: Host) -> None:
    for name in ("left", "right"):
        host.ip("link", "set", name, "down")


def come_up(host: Host) -> None:
    for name in ("left", "right"):
        host.ip("link", "set", name, "up")


def rename(host: Host) -> None:
    for name in ("left", "right"):
        host.ip("link", "set", name, "down")
        host.ip("link", "set", name, "name", f"{name}-else")


def rename_back(host: Host) -> None:
    for name in ("left", "right"):
        host.ip("link", "set", f"{name}-else", "name", name)
        host.ip("link", "set", name, "up")


def lose_address(host: Host) -> None:
    host.ip("addr", "del", "10.2.0.1/24", "dev", "right")


def get_another_address(host: Host) -> None:
    host.ip("addr", "add", "10.2.0.77/24", "dev", "right")


FAULTS: dict[str, tuple[Callable[[Host], None], Callable[[Host], None], str, str]] = {
    "down": (go_down, come_up, "waiting: interface left is down", "10.2.0.1"),
    "renamed": (rename, rename_back, "waiting: interface left does not exist", "10.2.0.1"),
    "another address": (lose_address, get_another_address, "waiting: interface right has no IPv4 address", "10.2.0.77"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_rule_waits_and_comes_back_while_others_relay_on(
    line: Line, relay: Relay, tmp_path: Path, fault: str
) -> None:
    gen, host, sink = line.hosts
    break_it, mend_it, waiting, address = FAULTS[fault]
    assert relays(line, "10.2.0.1")
    steady = ("--interface", "spare", "--group", "239.2.2.2", "--idle-timeout", "2")
    with receiving(sink, tmp_path, *steady) as summary:
        to = ("--interface", "second", "--group", "239.1.1.2", "--rate", str(PPS), "--count", str(COUNT))
        sending = threading.Thread(target=send, args=(gen, *to))
        sending.start()
        break_it(host)
        wait_until(lambda: state(relay) == waiting, waiting)
        mend_it(host)
        wait_until(lambda: state(relay) == "active", "the rule is back")
        assert relays(line, address)
        sending.join()
        assert_perfect(summary(), COUNT)
    lines = [text for text in relay.text().splitlines() if "Interface " in text]
    assert len(lines) == len(set(lines)), lines
    relay.assert_accounted()
    relay.stop()


def test_a_deleted_interface_is_joined_again_when_it_is_back(line: Line, relay: Relay) -> None:
    gen, host, _ = line.hosts
    host.ip("link", "del", "left")
    wait_until(lambda: "waiting" in state(relay), "the rule waits")
    connect(gen, "right", "10.1.0.1/24", host, "left", "10.1.0.2/24")
    wait_until(lambda: state(relay) == "active", "the rule is back")
    igmp = str(host.run(["cat", "/proc/net/igmp"], capture_output=True).stdout)
    joined = re.search(r"\tleft .*\n((?:\t.*\n)*)", igmp)
    assert joined is not None
    assert "010101EF" in joined[1]  # 239.1.1.1
    assert relays(line, "10.2.0.1")
    relay.stop()
