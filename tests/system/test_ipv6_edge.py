"""IPv6 at the relay's edge: what explain, doctor, capture and metrics say of it is what the relay does, and joins last.

gen ──left── relay ──right── sink        fd00:1::/64, fd00:2::/64
"""

import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.system.harness import PYTHON, Relay, send, wait_until
from tests.system.test_capture import GOOD, INBOUND, OUTBOUND, capturing, dissect
from tests.system.test_doctor import doctor, of, shell
from tests.system.test_explain import explain, remove_all, states, step
from tests.system.test_ipv6 import listener, receive
from tools.netns import Host, Line

IN, OUT = "[ff3e::1]:5001", "[ff3e::2]:6001:right"
GEN, OTHER = "fd00:1::1", "fd00:1::9"
COUNT = 1000
QUERIES = """
from scapy.layers.inet6 import ICMPv6MLQuery2, IPv6, IPv6ExtHdrHopByHop, RouterAlert
from scapy.layers.l2 import Ether
from scapy.sendrecv import sendp
network = IPv6(src="fe80::254", dst="ff02::1", hlim=1) / IPv6ExtHdrHopByHop(options=[RouterAlert()])
query = Ether(dst="33:33:00:00:00:01") / network / ICMPv6MLQuery2(mladdr="::", mrd=1)
print("ready", flush=True)
sendp(query, iface="right", inter=0.05, loop=1, verbose=False)
"""


@pytest.fixture(scope="module")
def line() -> Iterator[Line]:
    with Line("gen", "relay", "sink") as line:
        line.hosts[0].ip("addr", "add", f"{OTHER}/64", "dev", "right", "nodad")
        yield line


@pytest.fixture(scope="module")
def relay_of_all(line: Line, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    relay = Relay(line.hosts[1], tmp_path_factory.mktemp("relay"), ("left",))
    try:
        yield relay
    finally:
        relay.kill()


@pytest.fixture
def relay(relay_of_all: Relay) -> Iterator[Relay]:
    """The relay of all tests, without rules at the end."""
    yield relay_of_all
    remove_all(relay_of_all)


def relayed(line: Line, cases: Sequence[tuple[str, str, int]]) -> set[int]:
    """Which of these datagrams arrive at the sink. The last must: it proves that the others have had their turn."""
    gen, _, sink = line.hosts
    arrived: set[int] = set()
    with listener(sink, OUT) as sock:
        for number, (source, group, port) in enumerate(cases):
            with gen.inside(), socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as out:
                out.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, socket.if_nametoindex("right"))
                out.bind((source, 0))
                out.sendto(bytes([number]), (group, port))
        while len(cases) - 1 not in arrived:
            arrived.add(receive(sock)[0][0])
    return arrived


def groups_joined(host: Host) -> set[str]:
    rows = str(host.run(["cat", "/proc/net/igmp6"], capture_output=True).stdout).splitlines()
    return {
        socket.inet_ntop(socket.AF_INET6, bytes.fromhex(row.split()[2])) for row in rows if row.split()[1] == "left"
    }


def test_the_verdict_is_what_the_relay_does(line: Line, relay: Relay) -> None:
    relay.add("tv", IN, OUT)
    relay.add("picky", "[ff3e::3]:5001", OUT, options=("--source", OTHER))
    cases = [
        (OTHER, "ff3e::3", 5001),
        (GEN, "ff3e::3", 5001),
        (GEN, "ff3e::1", 5002),
        (GEN, "ff3e::4", 5001),
        (GEN, "ff3e::1", 5001),
    ]
    really = relayed(line, cases)
    answers = [explain(relay, source, f"[{group}]:{port}") for source, group, port in cases]
    assert {number for number, answer in enumerate(answers) if answer["relayed"]} == really == {0, 4}
    assert step(answers[0], "join")["reason"] == f"ff3e::3 is joined on left for {OTHER}"
    assert step(answers[1], "join")["verdict"] == "stop"
    assert f"the nearest is picky, which differs in source: it takes only {OTHER}" in answers[1]["summary"]
    assert "the packet filter on left keeps [ff3e::1]:5002 out" in step(answers[2], "filter")["reason"]
    assert step(answers[3], "join")["reason"].startswith("no rule wants ff3e::4 on left")
    assert step(answers[4], "interface")["reason"].endswith("fd00:1::1 is in its network fd00:1::/64")
    assert step(answers[4], "join")["reason"] == "ff3e::1 is joined on left, any source"
    output = step(answers[4], "output")["reason"]
    assert "leaves right to [ff3e::2]:6001 from fd00:2::1 with hop limit 1; payloads over 1452 bytes" in output
    assert "has matched 1, relayed 1, dropped 0" in step(answers[4], "counters")["reason"]
    shown = relay.control("explain", f"[{GEN}]:4000", IN)
    assert f"{GEN} to {IN} on left would be relayed by tv through 1 of 1 outputs" in shown.stdout
    own = explain(relay, "fd00:1::2", IN)
    assert "fd00:1::2 is this host's own address" in own["summary"]
    mixed = relay.control("explain", "10.1.0.1", IN)
    assert (
        mixed.stderr == "mcrctl: 10.1.0.1 never sends to ff3e::1: give both as IPv4 addresses, or both as IPv6 ones\n"
    )


def test_wrong_settings_are_found_and_their_remedies_mend_them(line: Line, relay: Relay) -> None:
    host = line.hosts[1]
    relay.add("picky", IN, OUT, options=("--source", OTHER))
    assert {each["severity"] for each in doctor(relay) if each["check"] == "ipv6-addresses"} == {"ok"}
    shell(host, "sysctl -qw net.ipv6.conf.left.force_mld_version=1; ip addr del fd00:2::1/64 dev right")
    wait_until(lambda: "from fe80::" in step(explain(relay, OTHER, IN), "output")["reason"], "it leaves from another")
    found = doctor(relay)
    forced = of(found, "mld-version")
    assert (forced["severity"], forced["finding"][:27]) == ("warning", "MLDv1 is forced on left, th")
    assert of(found, "ipv6-addresses", "right has only a link-local address")["severity"] == "note"
    assert of(found, "mld-querier")["severity"] == "note"
    assert of(found, "joined", "1 group joined")["severity"] == "ok"
    shell(host, "sysctl -qw net.ipv6.conf.right.disable_ipv6=1")
    wait_until(lambda: states(relay) == ["waiting: interface right has no IPv6 address"], "the rule waits")
    disabled = of(doctor(relay), "ipv6-addresses", "IPv6 is disabled on right")
    assert disabled["severity"] == "problem"
    for remedy in (forced["remedy"], disabled["remedy"], "ip addr add fd00:2::1/64 dev right nodad"):
        shell(host, str(remedy))
    wait_until(lambda: states(relay) == ["active"], "the rule is back")
    mended = doctor(relay)
    for check in ("mld-version", "ipv6-addresses", "rules"):
        assert {each["severity"] for each in mended if each["check"] == check} == {"ok"}, check


def test_a_querier_of_mld_is_heard(line: Line, relay: Relay) -> None:
    relay.add("tv", IN, OUT)
    queries = line.hosts[0].popen([PYTHON, "-c", QUERIES], stdout=subprocess.PIPE)
    try:
        assert queries.stdout is not None
        assert queries.stdout.readline() == "ready\n"
        wait_until(
            lambda: of(doctor(relay, "--seconds", "1"), "mld-querier")["finding"] == "fe80::254 queries on left",
            "heard",
        )
    finally:
        queries.kill()
        queries.wait()


def test_both_sides_are_captured_as_the_wire_carries_them(line: Line, relay: Relay, tmp_path: Path) -> None:
    relay.add("tv", IN, OUT, "239.2.2.2:6003:right")
    relay.add("other", "[ff3e::4]:5001", "[ff3e::5]:6001:right")
    to = ("--interface", "right", "--port", "5001", "--rate", "20000")
    with capturing(relay, tmp_path, "tv", "--count", str(3 * COUNT)) as capture:
        send(line.hosts[0], *to, "--group", "ff3e::4", "--count", "100")
        send(line.hosts[0], *to, "--group", "ff3e::1", "--count", str(COUNT))
        capture.wait()
    fields = ("frame.interface_name", "frame.packet_flags_direction", "ipv6.dst", "ip.dst", "udp.length")
    assert Counter(dissect(capture.file, *fields, "udp.checksum.status")) == {
        ("left", INBOUND, "ff3e::1", "", "1324", GOOD): COUNT,
        ("right", OUTBOUND, "ff3e::2", "", "1324", GOOD): COUNT,
        ("right", OUTBOUND, "", "239.2.2.2", "1324", GOOD): COUNT,
    }


def test_metrics_name_outputs_as_commands_do(relay: Relay) -> None:
    relay.add("tv", IN, OUT)
    assert f'mcr_output_packets_total{{output="{OUT}",rule="tv"}} 0.0' in relay.control("metrics", "--once").stdout


def test_joins_outlive_a_killed_supervisor(line: Line, relay: Relay) -> None:
    host = line.hosts[1]
    relay.add("picky", IN, OUT, options=("--source", OTHER))
    relay.add("unicast", "[fd00:1::2]:5001", "239.2.2.2:6003:right")
    relay.process.send_signal(signal.SIGKILL)
    relay.process.wait()
    assert "ff3e::1" in groups_joined(host)
    relay.start_again()
    assert "ff3e::1" in groups_joined(host)
    wait_until(lambda: states(relay) == ["active", "active"], "the rules are back")
    udp = str(host.run(["cat", "/proc/net/udp6"], capture_output=True).stdout)
    held = socket.inet_pton(socket.AF_INET6, "fd00:1::2")
    words = "".join(f"{int.from_bytes(held[at : at + 4], 'little'):08X}" for at in range(0, 16, 4))
    assert f"{words}:1389" in udp
    assert relayed(line, [(GEN, "ff3e::1", 5001), (OTHER, "ff3e::1", 5001)]) == {1}
    remove_all(relay)
    wait_until(lambda: "ff3e::1" not in groups_joined(host), "left by the one that did not join")


def test_joins_that_a_small_mtu_took_away_come_back(line: Line, relay: Relay) -> None:
    """The kernel takes IPv6 off the interface, and joins nothing again by itself."""
    host = line.hosts[1]
    relay.add("tv", IN, OUT)
    shell(host, "ip link set left mtu 1000")
    reason = "waiting: interface left has an MTU of 1000 bytes, and IPv6 needs 1280"
    wait_until(lambda: states(relay) == [reason], "the rule waits")
    assert "ff3e::1" not in groups_joined(host)
    shell(host, "ip link set left mtu 1500; ip addr add fd00:1::2/64 dev left nodad")
    wait_until(lambda: "ff3e::1" in groups_joined(host), "joined again")
    wait_until(lambda: states(relay) == ["active"], "the rule is back")
    assert relayed(line, [(GEN, "ff3e::1", 5001)]) == {0}
