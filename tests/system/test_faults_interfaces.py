"""Interfaces that go, come back and change: rules wait and return by themselves.

gen ══left, second══ relay ══right, spare══ sink        10.1.0.0/24, 10.4.0.0/24, 10.2.0.0/24, 10.3.0.0/24
"""

import os
import re
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.system.conftest import StartRelay
from tests.system.harness import Relay, assert_perfect, receiver, wait_until
from tests.system.harness import sender as traffic
from tests.system.test_handover import kill_supervisor
from tests.system.test_rules import listener, receive, sender
from tools.netns import Host, Line, connect

PPS = 20_000
FELT = 1000  # datagrams
IN, OUT = "239.1.1.1:5001", "239.2.2.1:6001:right"
STEADY_IN, STEADY_OUT = "239.1.1.2:5001", "239.2.2.2:6001:spare"
JOINED = "010101EF"  # 239.1.1.1, as /proc/net/igmp has it


@pytest.fixture
def relay(line: Line, start_relay: StartRelay) -> Relay:
    """Two rules: one for the interfaces that suffer, one that has nothing to do with them."""
    gen, host, sink = line.hosts
    connect(host, "spare", "10.3.0.1/24", sink, "spare", "10.3.0.2/24")
    connect(gen, "second", "10.4.0.1/24", host, "second", "10.4.0.2/24")
    relay = start_relay(host, ("left", "second"), 1, "--ring-mib", "128")
    relay.add("r", IN, OUT, options=("--input-interface", "left"))
    relay.add("steady", STEADY_IN, STEADY_OUT, options=("--input-interface", "second"))
    return relay


def state(relay: Relay) -> str:
    return next(str(rule["state"]) for rule in relay.stats()["rules"] if rule["rule_id"] == "r")


def waits(relay: Relay, why: str) -> bool:
    return state(relay) == f"waiting: {why}"


def relays(line: Line, address: str) -> bool:
    """Whether the rule relays a datagram now, from this source address."""
    gen, _, sink = line.hosts
    with sender(gen) as out, listener(sink, "239.2.2.1", 6001) as sock:
        sock.settimeout(0.5)
        out.sendto(b"payload", ("239.1.1.1", 5001))
        try:
            payload, source, _, _ = receive(sock)
        except TimeoutError:
            return False
    return (payload, source) == (b"payload", address)


def groups_joined(host: Host, interface: str) -> str:
    igmp = str(host.run(["cat", "/proc/net/igmp"], capture_output=True).stdout)
    joined = re.search(rf"\t{interface} .*\n((?:\t.*\n)*)", igmp)
    return joined[1] if joined else ""


@contextmanager
def steady_traffic(line: Line, folder: Path) -> Iterator[None]:
    """Traffic of the other rule during the block; none is lost or reordered."""
    gen, _, sink = line.hosts
    to = ("--interface", "second", "--group", "239.1.1.2", "--rate", str(PPS))
    with (
        receiver(sink, folder, "--interface", "spare", "--group", "239.2.2.2") as received,
        traffic(gen, folder, *to) as sending,
    ):
        yield
        count = sending.interrupt()["datagrams"]
        assert_perfect(received.drain(count), count)


@contextmanager
def unnoticed(relay: Relay) -> Iterator[None]:
    """What happens in the block is over when the supervisor looks; workers relay meanwhile."""
    os.kill(relay.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(relay.pid, signal.SIGCONT)


def go_down(line: Line) -> None:
    for name in ("left", "right"):
        line.hosts[1].ip("link", "set", name, "down")


def come_up(line: Line) -> None:
    for name in ("left", "right"):
        line.hosts[1].ip("link", "set", name, "up")


def rename(line: Line) -> None:
    for name in ("left", "right"):
        line.hosts[1].ip("link", "set", name, "down")
        line.hosts[1].ip("link", "set", name, "name", f"{name}-else")


def rename_back(line: Line) -> None:
    for name in ("left", "right"):
        line.hosts[1].ip("link", "set", f"{name}-else", "name", name)
        line.hosts[1].ip("link", "set", name, "up")


def lose_address(line: Line) -> None:
    line.hosts[1].ip("addr", "del", "10.2.0.1/24", "dev", "right")


def get_another_address(line: Line) -> None:
    line.hosts[1].ip("addr", "add", "10.2.0.77/24", "dev", "right")


def delete(line: Line) -> None:
    line.hosts[1].ip("link", "del", "left")


def make_again(line: Line) -> None:
    gen, host, _ = line.hosts
    connect(gen, "right", "10.1.0.1/24", host, "left", "10.1.0.2/24")


Step = Callable[[Line], None]
FAULTS: dict[str, tuple[Step, Step, str, str]] = {
    "down": (go_down, come_up, "interface left is down", "10.2.0.1"),
    "renamed": (rename, rename_back, "interface left does not exist", "10.2.0.1"),
    "deleted": (delete, make_again, "interface left does not exist", "10.2.0.1"),
    "another address": (lose_address, get_another_address, "interface right has no IPv4 address", "10.2.0.77"),
}


def create_anew(line: Line) -> None:
    """Replace `left` by another under its name and index. The old one's ring and membership are gone."""
    gen, host, _ = line.hosts
    with host.inside():
        index = socket.if_nametoindex("left")
    host.ip("link", "del", "left")
    peer = ("peer", "name", "right", "netns", gen.namespace)
    host.ip("link", "add", "left", "index", str(index), "type", "veth", *peer)
    for end, name, address in ((host, "left", "10.1.0.2/24"), (gen, "right", "10.1.0.1/24")):
        end.ip("addr", "add", address, "dev", name)
        end.ip("link", "set", name, "up")


def is_joined(host: Host) -> bool:
    return JOINED in groups_joined(host, "left")


def test_a_rule_waits_and_comes_back_while_others_relay_on(line: Line, relay: Relay, tmp_path: Path) -> None:
    """One fault after the other: what is seen, and a new interface that nothing tells from the old one."""
    host = line.hosts[1]
    wait_until(partial(relays, line, "10.2.0.1"), "the rule relays")
    with steady_traffic(line, tmp_path):
        for fault, (break_it, mend_it, why, address) in FAULTS.items():
            said = len(relay.text())
            break_it(line)
            wait_until(partial(waits, relay, why), why)
            mend_it(line)
            wait_until(lambda: state(relay) == "active", f"the rule is back: {fault}")
            wait_until(partial(relays, line, address), f"the rule relays again: {fault}")
            assert is_joined(host), fault
            lines = [text for text in relay.text()[said:].splitlines() if "Interface " in text]
            assert len(lines) == len(set(lines)), lines
        with unnoticed(relay):
            create_anew(line)
        wait_until(lambda: is_joined(host), "joined by a supervisor that has not seen it happen")
        wait_until(lambda: relays(line, address), "the rule relays again")
        assert relay.text().count("Interface left was created anew") == 1
        kill_supervisor(relay)
        create_anew(line)
        assert not is_joined(host)
        relay.start_again()
        wait_until(lambda: is_joined(host), "joined by the next supervisor")
        wait_until(lambda: relays(line, address), "the rule relays again")
    relay.assert_accounted()
    relay.stop()


def through(gen: Host, interface: str, sock: socket.socket) -> bool:
    """Whether a datagram sent from an interface arrives."""
    payload = os.urandom(8)
    with gen.inside():
        out = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        index = socket.if_nametoindex(interface)
    with out:
        mreqn = struct.pack("@4s4si", bytes(4), bytes(4), index)
        out.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, mreqn)
        out.sendto(payload, ("239.1.1.1", 5001))
    sock.settimeout(0.5)
    try:
        return receive(sock)[0] == payload
    except TimeoutError:
        return False


def drain(sock: socket.socket) -> int:
    """Read what is there; return how many."""
    sock.setblocking(False)
    count = 0
    while True:
        try:
            sock.recv(2048)
        except BlockingIOError:
            return count
        count += 1


def test_interfaces_that_swap_their_names_are_read_under_the_new_ones(line: Line, relay: Relay) -> None:
    """The rule is for what is called `left` now; the ring of what was called so is not read for it any more."""
    gen, host, sink = line.hosts
    relay.add("by-second", IN, "239.2.2.3:6001:right", options=("--input-interface", "second"))
    with unnoticed(relay):
        for name, new in (("left", "tmp"), ("second", "left"), ("tmp", "second")):
            host.ip("link", "set", name, "down")
            host.ip("link", "set", name, "name", new)
        for name in ("left", "second"):
            host.ip("link", "set", name, "up")
    for name in ("left", "second"):
        relay.wait_for_log(f"Interface {name} appeared, up")
    with listener(sink, "239.2.2.1", 6001) as left, listener(sink, "239.2.2.3", 6001) as second:
        for sock, via in ((second, "right"), (left, "second")):
            wait_until(partial(through, gen, via, sock), f"what comes from {via} is relayed")
        drain(left)
        drain(second)
        assert through(gen, "right", second)
        assert through(gen, "second", left)
        assert drain(left) == drain(second) == 0
    relay.stop()


def flows_on(relay: Relay) -> None:
    before = relay.stats()["packets_relayed"]
    wait_until(lambda: relay.stats()["packets_relayed"] > before + FELT, "traffic flows on")


def test_every_datagram_is_accounted_while_an_output_waits_and_interfaces_change(
    line: Line, relay: Relay, tmp_path: Path
) -> None:
    """All of it comes in; what the output misses is counted, what leaves is in order."""
    gen, host, sink = line.hosts
    sink.ip("addr", "add", "10.9.0.2/24", "dev", "left")
    to = ("--interface", "right", "--rate", str(PPS), "--size", "500")
    with (
        receiver(sink, tmp_path, "--interface", "left", "--group", "239.2.2.1") as received,
        traffic(gen, tmp_path, *to) as sending,
    ):
        flows_on(relay)
        said = len(relay.text())
        host.ip("link", "set", "right", "down")
        wait_until(lambda: state(relay) == "waiting: interface right is down", "the rule waits")
        wait_until(lambda: relay.stats()["drops"].get("send_error_errno_100", 0) > FELT, "drops are counted")
        host.ip("link", "set", "right", "up")
        wait_until(lambda: state(relay) == "active", "the rule is back")
        flows_on(relay)
        assert len([text for text in relay.text()[said:].splitlines() if "Interface right is" in text]) == 2
        host.ip("addr", "add", "10.9.0.1/24", "dev", "right")
        host.ip("addr", "del", "10.2.0.1/24", "dev", "right")
        relay.wait_for_log("Interface right has 10.9.0.1\n")
        wait_until(lambda: state(relay) == "active", "the rule is active")
        flows_on(relay)
        before = relay.stats()["drops"]
        host.ip("link", "set", "left", "mtu", "600")
        relay.wait_for_log("Interface left has an MTU of 600 bytes")
        flows_on(relay)
        assert relay.stats()["drops"] == before
        sink.ip("link", "set", "left", "down")
        relay.wait_for_log("[Notice] [Supervisor] Interface right has no carrier")
        relay.wait_for_log("[Warning] [Supervisor] Interface right dropped ")  # the kernel takes and throws away
        sink.ip("link", "set", "left", "up")
        relay.wait_for_log("[Notice] [Supervisor] Interface right has a carrier again")
        flows_on(relay)
        sent = sending.interrupt()["datagrams"]
        summary = received.drain()
    stats = relay.assert_accounted()
    assert stats["packets_in"] == stats["packets_matched"] == sent
    assert summary["reordered"] == summary["duplicated"] == summary["corrupt"] == 0
    assert 3 * FELT < summary["datagrams"] <= sent - stats["drops"]["send_error"]
    wait_until(partial(relays, line, "10.9.0.1"), "the rule relays from the new address")
    assert relay.stop().count("Interface right has no carrier") == 1
