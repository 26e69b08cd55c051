"""Rules on real traffic: addresses, TTL, sources, changes while traffic flows, interfaces that come and go.

gen ──left── relay ──right── sink        10.1.0.0/24, 10.2.0.0/24
"""

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from relay.errors import ExitCode
from tests.system.conftest import StartRelay
from tests.system.harness import DEADLINE_S, Relay, assert_perfect, receiving, relayed_whole, send, wait_until
from tools.netns import Host, Line

IP_RECVTTL, IP_RECVTOS = 12, 13
COUNT = 10_000
CHANGES = 6
IN, OUT = "239.1.1.1:5001", "239.2.2.2:6001:right"


@pytest.fixture
def relay(line: Line, start_relay: StartRelay) -> Relay:
    return start_relay(line.hosts[1], ("left",), 1, "--ring-mib", "64")


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    """A relay for requests that change nothing."""
    with Line("gen", "relay", "sink") as line:
        relay = Relay(line.hosts[1], tmp_path_factory.mktemp("refusing"), ("left",))
        yield relay
        relay.kill()


@contextmanager
def sender(host: Host, ttl: int = 1) -> Iterator[socket.socket]:
    """A socket that sends multicast from gen's interface."""
    with host.inside():
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        index = socket.if_nametoindex("right")
    with sock:
        mreqn = struct.pack("@4s4si", bytes(4), bytes(4), index)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, mreqn)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, ttl)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
        yield sock


@contextmanager
def listener(host: Host, address: str, port: int) -> Iterator[socket.socket]:
    """A socket at sink that also tells TTL and TOS."""
    with host.inside():
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        index = socket.if_nametoindex("left")
    with sock:
        sock.bind((address, port))
        if address.startswith("239."):
            mreqn = struct.pack("@4s4si", socket.inet_aton(address), bytes(4), index)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, mreqn)
        sock.setsockopt(socket.IPPROTO_IP, IP_RECVTTL, 1)
        sock.setsockopt(socket.IPPROTO_IP, IP_RECVTOS, 1)
        sock.settimeout(10)
        yield sock


def receive(sock: socket.socket) -> tuple[bytes, str, int, int]:
    """Payload, source address, TTL and TOS of the next datagram."""
    payload, control, _, source = sock.recvmsg(2048, 256)
    values = {kind: data[0] for _, kind, data in control}
    return payload, source[0], values[socket.IP_TTL], values[socket.IP_TOS]


@pytest.mark.parametrize("input_group", ["239.1.1.1", "10.1.0.2"])
@pytest.mark.parametrize("output_group", ["239.2.2.2", "10.2.0.2"])
def test_multicast_and_unicast_in_every_combination(
    line: Line, relay: Relay, input_group: str, output_group: str
) -> None:
    gen, _, sink = line.hosts
    relay.add("r1", f"{input_group}:5001", f"{output_group}:6001:right")
    with sender(gen) as out, listener(sink, output_group, 6001) as sock:
        out.sendto(b"payload", (input_group, 5001))
        payload, source, _, _ = receive(sock)
    assert (payload, source) == (b"payload", "10.2.0.1")
    relay.assert_accounted()


def test_a_unicast_input_causes_no_icmp_port_unreachable(line: Line, relay: Relay) -> None:
    gen, _, sink = line.hosts
    relay.add("r1", "10.1.0.2:5001", OUT)
    with sender(gen) as out, listener(sink, "239.2.2.2", 6001) as sock:
        out.connect(("10.1.0.2", 5001))
        for _ in range(5):
            out.send(b"payload")  # a port unreachable would fail the next send
            receive(sock)


def test_what_is_routed_through_this_host_is_relayed_and_such_an_address_is_told_of(line: Line, relay: Relay) -> None:
    gen, host, sink = line.hosts
    gen.ip("route", "add", "10.9.9.9", "via", "10.1.0.2")
    warned = relay.control("add-rule", "--rule-id", "r1", "--input-group", "10.9.9.9", "--input-port", "5001",
                           "--output", OUT)  # fmt: skip
    told = "warning: 10.9.9.9 is no address of this host: only what is routed through it comes to the relay"
    assert (warned.returncode, warned.stderr.startswith(told)) == (0, True), warned.stderr
    with sender(gen) as out, listener(sink, "239.2.2.2", 6001) as sock:
        out.sendto(b"payload", ("10.9.9.9", 5001))
        assert receive(sock)[0] == b"payload"
    finding = "no address of this host: 10.9.9.9"
    assert finding in relay.control("doctor", "--seconds", "0.1").stdout
    host.ip("addr", "add", "10.9.9.9/32", "dev", "left")
    wait_until(lambda: "0909090A:1389" in host.run(["cat", "/proc/net/udp"], capture_output=True).stdout, "it is held")
    assert finding not in relay.control("doctor", "--seconds", "0.1").stdout
    again = relay.control("add-rule", "--rule-id", "r2", "--input-group", "10.9.9.9", "--input-port", "5001",
                          "--output", "239.2.2.3:6001:right")  # fmt: skip
    assert (again.returncode, again.stderr) == (0, "")


@pytest.mark.parametrize(
    ("sent", "rule", "arrives"), [(9, "", 1), (9, ":7", 7), (9, ":decrement", 8), (2, ":decrement", 1)]
)
def test_ttl_is_one_or_as_asked_or_decremented(line: Line, relay: Relay, sent: int, rule: str, arrives: int) -> None:
    gen, _, sink = line.hosts
    relay.add("r1", IN, OUT + rule)
    with sender(gen, sent) as out, listener(sink, "239.2.2.2", 6001) as sock:
        out.sendto(b"payload", ("239.1.1.1", 5001))
        assert receive(sock)[2] == arrives


def test_a_decremented_ttl_of_zero_is_dropped_and_counted(line: Line, relay: Relay) -> None:
    gen, _, _ = line.hosts
    relay.add("r1", IN, OUT + ":decrement")
    with sender(gen, 1) as out:
        for _ in range(3):
            out.sendto(b"payload", ("239.1.1.1", 5001))
    wait_until(lambda: relay.stats()["drops"]["ttl"] == 3, "drops counted")
    relay.assert_accounted()


def test_dscp_is_set(line: Line, relay: Relay) -> None:
    gen, _, sink = line.hosts
    relay.add("r1", IN, OUT, options=("--dscp", "34"))
    with sender(gen) as out, listener(sink, "239.2.2.2", 6001) as sock:
        out.sendto(b"payload", ("239.1.1.1", 5001))
        assert receive(sock)[3] == 34 << 2


def test_preserve_source_keeps_the_senders_address(line: Line, relay: Relay) -> None:
    gen, _, sink = line.hosts
    relay.add("r1", IN, OUT, options=("--preserve-source",))
    sink.run(["sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.left.rp_filter=0"])
    with sender(gen) as out, listener(sink, "239.2.2.2", 6001) as sock:
        for _ in range(3):
            out.sendto(b"payload", ("239.1.1.1", 5001))
            assert receive(sock)[1] == "10.1.0.1"


def test_a_rule_with_a_source_takes_no_other(line: Line, relay: Relay) -> None:
    gen, _, sink = line.hosts
    gen.ip("addr", "add", "10.1.0.9/24", "dev", "right")
    relay.add("r1", IN, OUT, options=("--source", "10.1.0.9"))
    with sender(gen) as other, sender(gen) as wanted, listener(sink, "239.2.2.2", 6001) as sock:
        other.bind(("10.1.0.1", 0))
        wanted.bind(("10.1.0.9", 0))
        other.sendto(b"other", ("239.1.1.1", 5001))
        wanted.sendto(b"wanted", ("239.1.1.1", 5001))
        assert receive(sock)[0] == b"wanted"
    assert relay.assert_accounted()["packets_relayed"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input-group", "ff3e::1", "--output", OUT], "IPv6, which is not supported yet"),
        (["--input-group", "239.1.1", "--output", OUT], "is not an IPv4 address"),
        (["--input-group", "239.1.1.1", "--output", "239.2.2.2:0:right"], "output port 0: give a port from 1 to 65535"),
        (["--input-group", "239.1.1.1", "--output", "239.2.2.2:6001"], "expected GROUP:PORT:INTERFACE[:TTL]"),
        ([], "--input-group and --input-port are needed, or --file"),
        (["--input-group", "239.1.1.1"], "no output"),
        (["--input-group", "239.1.1.1", "--output", OUT, "--ttl", "3"], "with --output, write G:P:I:TTL"),
        (["--input-group", "239.1.1.1", "--output-group", "239.2.2.2"], "--output-port, --output-interface missing"),
        (["--input-group", "239.1.1.1", "--output", "239.2.2.2:6001:right:300"], "ttl '300'"),
    ],
)
def test_a_command_line_that_is_no_rule_is_refused_with_the_reason(
    refusing: Relay, arguments: list[str], message: str
) -> None:
    result = refusing.control("add-rule", "--input-port", "5001", *arguments)
    assert result.returncode == ExitCode.USAGE
    assert message in result.stderr
    assert refusing.ask("list-rules") == []


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("239.2.2.2:6001:nowhere", "no interface nowhere: this host has"),
        ("239.1.1.1:5001:left", "equals its input on the same interface"),
    ],
)
def test_a_rule_that_this_relay_can_not_have_is_refused_with_the_reason(
    refusing: Relay, output: str, message: str
) -> None:
    result = refusing.control("add-rule", "--input-group", "239.1.1.1", "--input-port", "5001", "--output", output)
    assert result.returncode == ExitCode.FAILURE
    assert message in result.stderr
    assert refusing.ask("list-rules") == []


def test_a_cycle_through_several_rules_is_refused(relay: Relay) -> None:
    relay.add("a", "239.1.1.1:5001", "239.1.1.2:5001:left")
    relay.add("b", "239.1.1.2:5001", "239.1.1.3:5001:left")
    result = relay.control("add-rule", "--rule-id", "c", "--input-group", "239.1.1.3", "--input-port", "5001",
                           "--output", "239.1.1.1:5001:left")  # fmt: skip
    assert result.returncode == 1
    assert "cycle through rules c -> a -> b -> c" in result.stderr


def test_adding_a_rule_again_changes_nothing_and_other_content_needs_replace(relay: Relay) -> None:
    rule = ("add-rule", "--input-group", "239.1.1.1", "--input-port", "5001", "--output", OUT)
    (rule_id,) = relay.ask(*rule)["rule_ids"]
    assert relay.ask(*rule) == {"rule_ids": [rule_id], "unchanged": [rule_id], "replaced": []}
    other = (*rule[:-1], "239.2.2.3:6001:right", "--rule-id", rule_id)
    refused = relay.control(*other)
    assert refused.returncode == 1
    assert "use --replace" in refused.stderr
    assert relay.control(*other, "--replace").stdout == f"rule {rule_id} replaced\n"
    assert relay.control(*other, "--replace").stdout == f"rule {rule_id} unchanged\n"
    assert relay.ask("list-rules")[0]["outputs"][0]["group"] == "239.2.2.3"


def test_what_the_relay_sent_is_never_relayed_again(line: Line, start_relay: StartRelay, tmp_path: Path) -> None:
    host = line.hosts[1]
    relay = start_relay(host, ("lo",))
    relay.add("r1", IN, "239.1.1.2:5001:lo")
    result = relay.control("add-rule", "--rule-id", "r2", "--input-group", "239.1.1.2", "--input-port", "5001",
                           "--output", "239.1.1.3:5001:lo")  # fmt: skip
    assert "the relay never takes in what it sent itself" in result.stderr
    to = ("--group", "239.1.1.2", "--port", "5001")
    with receiving(host, tmp_path, *to) as summary:
        send(host, "--count", "100", "--rate", "1000")
        assert_perfect(summary(100), 100)
    stats = relay.assert_accounted()
    assert stats["drops"]["own_egress"] == 100
    assert stats["packets_relayed"] == 100


def test_rules_change_under_traffic_and_other_streams_notice_nothing(line: Line, relay: Relay, tmp_path: Path) -> None:
    relay.add("kept", IN, OUT, "239.2.2.9:6001:right")
    with relayed_whole(line, tmp_path, "--rate", "20000"):
        for i in range(CHANGES):
            relay.add(f"other{i}", f"239.1.2.{i}:5001", f"239.2.3.{i}:6001:right")
            # The receiver's output stays, the other becomes another.
            relay.add("kept", IN, OUT, f"239.2.2.{10 + i}:6001:right", options=("--replace",))
            if i % 3 == 2:
                relay.ask("remove-rule", f"other{i}")


def test_ten_thousand_rules_are_installed_and_match(line: Line, relay: Relay, tmp_path: Path) -> None:
    gen, _, sink = line.hosts
    rules = [(f"r{i}", f"239.1.{i // 250}.{i % 250 + 1}:5001", f"239.2.2.2:{6001 + i % 5}:right") for i in range(COUNT)]
    relay.add_many(tmp_path, rules)
    with receiving(sink, tmp_path, "--interface", "left", "--port", "6005") as summary:
        to = ("--group", "239.1.39.250", "--port", "5001")
        send(gen, "--interface", "right", "--rate", "20000", "--count", "20000", *to)
        assert_perfect(summary(20_000), 20_000)
    assert relay.assert_accounted()["packets_relayed"] == 20_000


def wait_for_state(relay: Relay, state: str) -> None:
    wait_until(lambda: relay.ask("list-rules")[0]["state"] == state, f"rule is {state}", DEADLINE_S)


def assert_relays(line: Line) -> None:
    gen, _, sink = line.hosts
    with sender(gen) as out, listener(sink, "239.2.2.2", 6001) as sock:
        out.sendto(b"payload", ("239.1.1.1", 5001))
        assert receive(sock)[0] == b"payload"


def test_an_interface_that_goes_down_and_up_is_followed(line: Line, relay: Relay) -> None:
    host = line.hosts[1]
    relay.add("r1", IN, OUT)
    for name in ("right", "left"):
        host.ip("link", "set", name, "down")
        relay.wait_for_log(f"[Notice] [Supervisor] Interface {name} is down")
        wait_for_state(relay, f"waiting: interface {name} is down")
        host.ip("link", "set", name, "up")
        wait_for_state(relay, "active")
        assert_relays(line)


def test_interfaces_that_are_deleted_and_come_back_are_followed(line: Line, relay: Relay) -> None:
    gen, host, sink = line.hosts
    relay.add("r1", IN, OUT)
    host.ip("link", "del", "left")
    wait_for_state(relay, "waiting: interface left does not exist")
    host.ip("link", "del", "right")
    relay.wait_for_log("Interface right is gone")
    for near, far, peer, address, far_address in (
        ("left", "right", gen, "10.1.0.2/24", "10.1.0.1/24"),
        ("right", "left", sink, "10.2.0.1/24", "10.2.0.2/24"),
    ):
        host.ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", peer.namespace)
        for end, name, own in ((host, near, address), (peer, far, far_address)):
            end.ip("addr", "add", own, "dev", name)
            end.ip("link", "set", name, "up")
    wait_for_state(relay, "active")
    assert_relays(line)
    relay.stop()


def test_a_rule_for_an_interface_that_is_down_waits_with_a_warning(line: Line, relay: Relay) -> None:
    line.hosts[1].ip("link", "set", "right", "down")
    relay.wait_for_log("Interface right is down")
    result = relay.control("add-rule", "--input-group", "239.1.1.1", "--input-port", "5001", "--output", OUT)
    assert result.returncode == 0
    assert "is waiting: interface right is down" in result.stderr


def test_groups_are_joined_beyond_the_limit_of_one_socket(line: Line, relay: Relay, tmp_path: Path) -> None:
    relay.add_many(tmp_path, [(f"r{i}", f"239.1.1.{i}:5001", OUT) for i in range(1, 61)])
    maddr = line.hosts[1].run(["ip", "maddr", "show", "dev", "left"], capture_output=True).stdout
    assert all(f"inet  239.1.1.{i}\n" in maddr for i in range(1, 61)), maddr
    relay.ask("remove-rule", *(f"r{i}" for i in range(1, 61)))
    maddr = line.hosts[1].run(["ip", "maddr", "show", "dev", "left"], capture_output=True).stdout
    assert "239.1.1." not in maddr


def test_several_interfaces_feed_one_rule(line: Line, start_relay: StartRelay) -> None:
    _, host, sink = line.hosts
    relay = start_relay(host, ("left", "right"))
    relay.add("r1", IN, "239.2.2.2:6001:right")
    assert_relays(line)
    with sink.inside():
        other = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        index = socket.if_nametoindex("left")
    with other, listener(sink, "239.2.2.2", 6001) as sock:
        mreqn = struct.pack("@4s4si", bytes(4), bytes(4), index)
        other.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, mreqn)
        other.sendto(b"from the other side", ("239.1.1.1", 5001))
        assert receive(sock)[0] == b"from the other side"


def test_log_levels_are_read_and_set(line: Line, relay: Relay) -> None:
    relay.add("r1", IN, OUT)
    assert set(relay.ask("log-level", "get").values()) == {"info"}
    relay.ask("log-level", "set", "debug", "--facility", "Ingress")
    segment = f"mcr_{relay.instance}_dp_c{relay.cores(1)[0]}_ingress"
    assert relay.ask("log-level", "get", "--facility", "Ingress") == {segment: "debug"}
    assert_relays(line)
    relay.wait_for_log("[Debug] [Ingress] Received 1 datagrams, 7 bytes from 10.1.0.1:")
    result = relay.control("log-level", "set", "debug", "--facility", "Nothing")
    assert result.returncode == 1
    assert "facilities are" in result.stderr


def test_an_output_may_be_given_in_single_options(line: Line, relay: Relay) -> None:
    gen, _, sink = line.hosts
    output = (
        "--output-group",
        "239.2.2.2",
        "--output-port",
        "6001",
        "--output-interface",
        "right",
        "--ttl",
        "decrement",
    )
    relay.ask("add-rule", "--input-group", "239.1.1.1", "--input-port", "5001", *output)
    with sender(gen, 9) as out, listener(sink, "239.2.2.2", 6001) as sock:
        out.sendto(b"payload", ("239.1.1.1", 5001))
        assert receive(sock)[2] == 8
