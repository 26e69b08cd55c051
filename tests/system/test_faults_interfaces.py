"""Interfaces that go, come back under other names and addresses: rules wait and return by themselves.

gen ──left── relay ══right, spare══ sink        10.1.0.0/24, 10.2.0.0/24, 10.3.0.0/24
"""

import os
import re
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.system.conftest import StartRelay
from tests.system.harness import Relay, assert_perfect, receiving, send, wait_until
from tests.system.test_rules import listener, receive, sender
from tools.netns import Host, Line, connect

PPS = 50_000
COUNT = 50_000 * int(os.environ.get("MCR_FAULT_SECONDS", "3"))
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
    assert "010101EF" in groups_joined(host, "left")  # 239.1.1.1
    assert relays(line, "10.2.0.1")
    relay.stop()


@contextmanager
def steady_traffic(line: Line, folder: Path) -> Iterator[None]:
    """50 000 datagrams/s of the other rule during the block; none is lost or reordered."""
    gen, _, sink = line.hosts
    with receiving(sink, folder, "--interface", "spare", "--group", "239.2.2.2", "--idle-timeout", "2") as summary:
        to = ("--interface", "second", "--group", "239.1.1.2", "--rate", str(PPS), "--count", str(COUNT))
        sending = threading.Thread(target=send, args=(gen, *to))
        sending.start()
        yield
        sending.join()
        assert_perfect(summary(), COUNT)


@contextmanager
def unnoticed(relay: Relay) -> Iterator[None]:
    """What happens in the block is over when the supervisor looks; workers relay meanwhile."""
    os.kill(relay.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(relay.pid, signal.SIGCONT)


def groups_joined(host: Host, interface: str) -> str:
    igmp = str(host.run(["cat", "/proc/net/igmp"], capture_output=True).stdout)
    joined = re.search(rf"\t{interface} .*\n((?:\t.*\n)*)", igmp)
    return joined[1] if joined else ""


def test_an_interface_created_anew_under_its_old_index_is_read_and_joined(
    line: Line, relay: Relay, tmp_path: Path
) -> None:
    """Neither its name nor its index tells, but the old ring reads nothing and the membership is gone."""
    gen, host, _ = line.hosts
    assert relays(line, "10.2.0.1")
    with host.inside():
        index = socket.if_nametoindex("left")
    with steady_traffic(line, tmp_path):
        with unnoticed(relay):
            host.ip("link", "del", "left")
            peer = ("peer", "name", "right", "netns", gen.namespace)
            host.ip("link", "add", "left", "index", str(index), "type", "veth", *peer)
            for end, name, address in ((host, "left", "10.1.0.2/24"), (gen, "right", "10.1.0.1/24")):
                end.ip("addr", "add", address, "dev", name)
                end.ip("link", "set", name, "up")
        wait_until(lambda: "010101EF" in groups_joined(host, "left"), "239.1.1.1 is joined again")
        wait_until(lambda: relays_now(line), "the rule relays again")
    assert relay.text().count("Interface left was created anew") == 1
    relay.assert_accounted()
    relay.stop()


def relays_now(line: Line) -> bool:
    """Whether a datagram comes through; one may be sent before the new ring lets anything in."""
    gen, _, sink = line.hosts
    with sender(gen) as out, listener(sink, "239.2.2.1", 6001) as sock:
        sock.settimeout(0.2)
        out.sendto(b"payload", ("239.1.1.1", 5001))
        try:
            return receive(sock)[0] == b"payload"
        except TimeoutError:
            return False


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


def test_what_an_output_misses_while_it_waits_is_counted(line: Line, relay: Relay, tmp_path: Path) -> None:
    """50 000 datagrams/s for a rule whose output goes down and comes back, and then has all of them again."""
    gen, host, sink = line.hosts
    with receiving(sink, tmp_path, "--interface", "left", "--group", "239.2.2.1", "--idle-timeout", "4") as summary:
        sending = threading.Thread(
            target=send, args=(gen, "--interface", "right", "--rate", str(PPS), "--count", str(2 * COUNT))
        )
        sending.start()
        wait_until(lambda: relay.stats()["packets_relayed"] > 1000, "traffic flows")
        host.ip("link", "set", "right", "down")
        wait_until(lambda: state(relay) == "waiting: interface right is down", "the rule waits")
        wait_until(lambda: relay.stats()["drops"].get("send_error_errno_100", 0) > 1000, "drops are counted")
        host.ip("link", "set", "right", "up")
        wait_until(lambda: state(relay) == "active", "the rule is back")
        dropped = relay.stats()["drops"]["send_error"]
        sending.join()
        received = summary()
    stats = relay.assert_accounted()
    assert stats["packets_matched"] == 2 * COUNT
    assert received["reordered"] == received["duplicated"] == 0
    assert received["datagrams"] > 1000
    assert stats["drops"]["send_error"] < 2 * COUNT
    assert stats["drops"]["send_error"] >= dropped
    lines = [text for text in relay.stop().splitlines() if "Interface right is" in text]
    assert len(lines) == 2, lines


def test_an_address_that_is_replaced_under_traffic_is_followed(line: Line, relay: Relay, tmp_path: Path) -> None:
    gen, host, sink = line.hosts
    sink.ip("addr", "add", "10.9.0.2/24", "dev", "left")
    with steady_traffic(line, tmp_path):
        send_r = threading.Thread(
            target=send, args=(gen, "--interface", "right", "--rate", "10000", "--count", "20000")
        )
        send_r.start()
        host.ip("addr", "add", "10.9.0.1/24", "dev", "right")
        host.ip("addr", "del", "10.2.0.1/24", "dev", "right")
        relay.wait_for_log("Interface right has 10.9.0.1\n")
        wait_until(lambda: state(relay) == "active", "the rule is active")
        send_r.join()
        assert relays(line, "10.9.0.1")
    relay.assert_accounted()
    relay.stop()


def test_a_lowered_mtu_of_an_input_loses_nothing_that_fits(line: Line, relay: Relay, tmp_path: Path) -> None:
    gen, host, sink = line.hosts
    with receiving(sink, tmp_path, "--interface", "left", "--group", "239.2.2.1", "--idle-timeout", "2") as summary:
        to = ("--interface", "right", "--rate", str(PPS), "--count", str(COUNT), "--size", "500")
        sending = threading.Thread(target=send, args=(gen, *to))
        sending.start()
        wait_until(lambda: relay.stats()["packets_relayed"] > 1000, "traffic flows")
        host.ip("link", "set", "left", "mtu", "600")
        relay.wait_for_log("Interface left has an MTU of 600 bytes")
        sending.join()
        assert_perfect(summary(), COUNT)
    relay.assert_accounted()
    relay.stop()


def test_a_link_without_carrier_is_told_once_and_used_again(line: Line, relay: Relay, tmp_path: Path) -> None:
    """The kernel takes what is sent and throws it away; the log has the number of frames."""
    gen, _, sink = line.hosts
    with steady_traffic(line, tmp_path):
        sink.ip("link", "set", "left", "down")
        relay.wait_for_log("[Notice] [Supervisor] Interface right has no carrier")
        send(gen, "--interface", "right", "--rate", "10000", "--count", "10000")
        relay.wait_for_log("[Warning] [Supervisor] Interface right dropped ")
        sink.ip("link", "set", "left", "up")
        relay.wait_for_log("[Notice] [Supervisor] Interface right has a carrier")
        wait_until(lambda: relays_now(line), "the rule relays again")
    relay.assert_accounted()
    text = relay.stop()
    assert text.count("Interface right has no carrier") == text.count("Interface right has a carrier") == 1
