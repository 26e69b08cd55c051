"""Exclusive ingress: what is relayed stays away from the host's own stack, everything else reaches it, always.

gen ──left── relay ──right── sink        10.1.0.0/24, 10.2.0.0/24
"""

import signal
import socket
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

from relay.errors import RelayError
from relay.supervisor.exclusive import Exclusive
from tests.system.conftest import StartRelay
from tests.system.harness import BIN, DEADLINE_S, Relay, assert_perfect, receiving, send, wait_until
from tests.system.test_faults_interfaces import create_anew, is_joined, unnoticed
from tests.system.test_rules import listener, sender
from tools.netns import Host, Line, connect

IN, OUT = "239.1.1.1:5001", "239.2.2.2:6001:right"
LARGE_BYTES = 4000  # three fragments


@pytest.fixture
def relay(line: Line, start_relay: StartRelay) -> Relay:
    relay = start_relay(line.hosts[1], ("left",), 1, "--exclusive")
    relay.add("r", IN, OUT)
    return relay


def hears(line: Line, port: int, payload: bytes = b"payload") -> bool:
    """Whether a receiver on the relay's own host gets a datagram; one behind it proves that it was waited for."""
    gen, host, _ = line.hosts
    with listener(host, "239.1.1.1", port) as local, listener(host, "239.1.1.99", 5099) as proof, sender(gen) as out:
        out.sendto(payload, ("239.1.1.1", port))
        out.sendto(b"proof", ("239.1.1.99", 5099))
        assert proof.recv(100) == b"proof"
        local.setblocking(False)
        try:
            return local.recv(65_536) == payload
        except BlockingIOError:
            return False


def tables(host: Host) -> str:
    """The nftables tables of a host."""
    return str(host.run(["nft", "list", "tables"], capture_output=True).stdout)


def test_only_what_a_rule_relays_stays_away_from_the_host(line: Line, relay: Relay, tmp_path: Path) -> None:
    gen, _, sink = line.hosts
    with receiving(sink, tmp_path, "--interface", "left") as summary:
        assert not hears(line, 5001)
        assert hears(line, 5002)
        relay.add("other", "239.1.1.1:5002", "239.2.2.2:6002:right")
        assert not hears(line, 5002)
        relay.ask("remove-rule", "other")
        assert hears(line, 5002)
        send(gen, "--interface", "right", "--rate", "50000", "--count", "50000")
        assert summary()["lost"] == 0
    assert relay.assert_accounted()["packets_relayed"] == 50_000 + 2  # and what the two rules relayed of `hears`


def test_fragments_are_relayed_and_reach_the_host_too(line: Line, relay: Relay) -> None:
    payload = bytes(range(250)) * (LARGE_BYTES // 250)
    with listener(line.hosts[2], "239.2.2.2", 6001) as sock:
        assert hears(line, 5001, payload)
        assert sock.recv(65_536) == payload


def test_a_stop_gives_the_traffic_back(line: Line, relay: Relay) -> None:
    assert not hears(line, 5001)
    relay.stop()
    assert hears(line, 5001)
    assert tables(line.hosts[1]) == ""


def test_a_kill_gives_the_traffic_back(line: Line, relay: Relay) -> None:
    relay.process.send_signal(signal.SIGKILL)
    relay.process.wait()
    wait_until(lambda: tables(line.hosts[1]) == "", "the kernel removed the table")
    assert hears(line, 5001)


def test_an_interface_that_comes_back_is_exclusive_again(line: Line, relay: Relay, tmp_path: Path) -> None:
    gen, host, sink = line.hosts
    host.ip("link", "del", "left")
    wait_until(lambda: "waiting" in relay.ask("list-rules")[0]["state"], "rule waits", DEADLINE_S)
    connect(gen, "right", "10.1.0.1/24", host, "left", "10.1.0.2/24")
    wait_until(lambda: relay.ask("list-rules")[0]["state"] == "active", "rule is active", DEADLINE_S)
    assert not hears(line, 5001)
    with unnoticed(relay):
        create_anew(line)  # under its old index; older kernels' chain goes with the old one
    wait_until(lambda: is_joined(host), "joined again")
    wait_until(lambda: not hears(line, 5001), "exclusive again")
    with receiving(sink, tmp_path, "--interface", "left") as summary:
        send(gen, "--interface", "right", "--rate", "20000", "--count", "20000")
        assert_perfect(summary(20_000), 20_000)


def test_a_start_is_refused_where_a_foreign_table_has_the_name(line: Line, start_relay: StartRelay) -> None:
    host = line.hosts[1]
    relay = start_relay(host, ("left",), 1)
    name = f"mcr_{relay.instance}"
    relay.stop()
    assert host.run(["nft", "add", "table", "netdev", name]).returncode == 0
    command = [str(BIN / "mcrd"), "--interface", "left", "--instance", relay.instance, "--exclusive"]
    result = host.run(command, capture_output=True)
    assert result.returncode != 0
    assert f"nftables table {name}" in result.stderr
    assert result.stderr.count("\n") == 1
    assert name in tables(host)
    assert relay.leftovers() == []


def test_a_refused_set_changes_nothing(line: Line) -> None:
    with line.hosts[1].inside():
        exclusive = Exclusive("unit")
        index = socket.if_nametoindex("left")
        try:
            exclusive.apply({("left", index): {("239.1.1.1", 5001)}})
            for name, port in (("left", 70_000), ('quo"te', 1)):
                with pytest.raises(RelayError, match=r"table mcr_unit: .|quote"):
                    exclusive.apply({(name, index): {("0.0.0.1", port)}})
            listing = line.hosts[1].run(["nft", "list", "table", "netdev", "mcr_unit"], capture_output=True).stdout
            assert "239.1.1.1 . 5001" in listing
        finally:
            exclusive.close()
        wait_until(lambda: tables(line.hosts[1]) == "", "the table is gone")


def heard_of_ipv6(line: Line, ports: Sequence[int], payload: bytes) -> set[int]:
    """On which ports a receiver on the relay's own host gets a datagram to ff3e::1; one behind it proves the wait."""
    gen, host, _ = line.hosts
    request = socket.inet_pton(socket.AF_INET6, "ff3e::1")
    listeners = {}
    with host.inside():
        for port in (*ports, 5099):
            listeners[port] = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
            listeners[port].bind(("ff3e::1", port))
            joining = request + struct.pack("@I", socket.if_nametoindex("left"))
            listeners[port].setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, joining)
    with gen.inside(), socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as out:
        out.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, socket.if_nametoindex("right"))
        for port in (*ports, 5099):
            out.sendto(payload, ("ff3e::1", port))
    listeners[5099].settimeout(DEADLINE_S)
    assert listeners[5099].recv(65_536) == payload
    heard = set()
    for port, sock in listeners.items():
        with sock:
            sock.setblocking(False)
            try:
                assert sock.recv(65_536) == payload
                heard.add(port)
            except BlockingIOError:
                pass
    return heard


def test_ipv6_inputs_stay_away_from_the_host_but_for_fragments(line: Line) -> None:
    with line.hosts[1].inside():
        exclusive = Exclusive("unit6")
        left = "left", socket.if_nametoindex("left")
        try:
            exclusive.apply({left: {("ff3e::1", 5001), ("239.1.1.1", 5001)}})
            assert heard_of_ipv6(line, (5001, 5002), b"payload") == {5002}
            assert heard_of_ipv6(line, (5001,), bytes(LARGE_BYTES)) == {5001}
            assert not hears(line, 5001)
            exclusive.apply({left: {("ff3e::1", 5002), ("239.1.1.1", 5001)}})
            assert heard_of_ipv6(line, (5001, 5002), b"payload") == {5001}
        finally:
            exclusive.close()
