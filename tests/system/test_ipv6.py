"""IPv6: every input and output, alone and with IPv4; what holds for IPv4 holds for it.

gen ──left── relay ──right── sink        fd00:1::/64, fd00:2::/64, besides 10.1.0.0/24, 10.2.0.0/24
"""

import os
import signal
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet import UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop, RouterAlert
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Packet, Raw

from relay.addresses import is_ipv6, is_multicast
from relay.sockaddr import sockaddr, sockaddr_storage
from tests.system.harness import (
    PPS,
    Relay,
    assert_perfect,
    receiver,
    sender,
    split_place,
    wait_until,
)
from tools.netns import Host, Line

SENDER = "fd00:1::1"
SSM, ASM, OF_LINK, UNICAST, IPV4 = "ff3e::8000:1", "ff05::5:1", "ff02::5:1", "fd00:1::2", "239.1.1.1"
PORT = 5001
OUT6, OUT4 = "[ff3e::9:1]:6001:right", "239.2.2.2:6003:right"
EVERY_OUTPUT = (OUT6, "[fd00:2::2]:6002:right", OUT4, "10.2.0.2:6004:right")
ROOM = ("--ring-mib", "256")  # 2.6 s at PPS: the machine may be busy
MARK = b"the last one"
HOP_LIMIT = {socket.AF_INET: (socket.IPPROTO_IP, 12), socket.AF_INET6: (socket.IPPROTO_IPV6, socket.IPV6_RECVHOPLIMIT)}
MCAST_JOIN_GROUP = 42
ETHERNET = Ether(src="02:00:00:00:00:01", dst="33:33:80:00:00:01")


@pytest.fixture(scope="module")
def line6() -> Iterator[Line]:
    with Line("gen", "relay", "sink") as line:
        line.hosts[1].ip("-6", "route", "add", "local", "ff00::/8", "dev", "lo")  # lo has none
        yield line


@pytest.fixture(scope="module")
def running(line6: Line, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    relay = Relay(line6.hosts[1], tmp_path_factory.mktemp("ipv6"), ("left",), 1, *ROOM)
    try:
        yield relay
        relay.stop()
    finally:
        relay.kill()


@pytest.fixture
def relay(running: Relay) -> Iterator[Relay]:
    """The module's relay, without rules."""
    yield running
    rules = [rule["rule_id"] for rule in running.ask("list-rules")]
    if rules:
        running.ask("remove-rule", *rules)


@contextmanager
def talker(host: Host, family: int = socket.AF_INET6, hops: int = 8) -> Iterator[socket.socket]:
    """A socket that sends from gen's interface."""
    with host.inside():
        sock = socket.socket(family, socket.SOCK_DGRAM)
        index = socket.if_nametoindex("right")
    with sock:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, hops)
            sock.bind((SENDER, 0))
        else:
            mreqn = struct.pack("@4s4si", bytes(4), bytes(4), index)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, mreqn)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, hops)
        yield sock


def say(host: Host, payload: bytes, group: str, hops: int = 8) -> None:
    """Send one datagram from gen."""
    with talker(host, socket.AF_INET6 if is_ipv6(group) else socket.AF_INET, hops) as sock:
        sock.sendto(payload, (group, PORT))


@contextmanager
def listener(host: Host, output: str) -> Iterator[socket.socket]:
    """A socket at sink for an output; it also tells hop limits."""
    group, port = split_place(output.rpartition(":")[0])
    family = socket.AF_INET6 if is_ipv6(group) else socket.AF_INET
    with host.inside():
        sock = socket.socket(family, socket.SOCK_DGRAM)
        index = socket.if_nametoindex("left")
    with sock:
        sock.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
        sock.bind(sockaddr(group, int(port), index))
        if is_multicast(group):
            level = socket.IPPROTO_IPV6 if family == socket.AF_INET6 else socket.IPPROTO_IP
            request = struct.pack("@I4x", index) + sockaddr_storage(group, index)
            sock.setsockopt(level, MCAST_JOIN_GROUP, request)
        sock.setsockopt(*HOP_LIMIT[family], 1)
        sock.settimeout(10)
        yield sock


def receive(sock: socket.socket) -> tuple[bytes, str, int]:
    """Payload, source address and hop limit of the next datagram."""
    payload, control, _, source = sock.recvmsg(65_535, 256)
    (hops,) = (struct.unpack("@i", data[:4])[0] for _, _, data in control)
    return payload, source[0], hops


def receive_until_mark(sock: socket.socket) -> list[bytes]:
    payloads = []
    while (payload := sock.recv(65_535)) != MARK:
        payloads.append(payload)
    return payloads


def inject(host: Host, packets: Sequence[Packet]) -> None:
    """Put frames on the cable."""
    with host.inside(), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind(("right", 0))
        for packet in packets:
            sock.send(bytes(packet))


def datagram(payload: bytes, *extensions: Packet, **udp: Any) -> Packet:
    packet: Packet = ETHERNET / IPv6(src=SENDER, dst=SSM, hlim=8)
    for extension in extensions:
        packet /= extension
    return packet / UDP(sport=4000, dport=PORT, **udp) / Raw(payload)


def place(group: str) -> str:
    return f"[{group}]:{PORT}" if is_ipv6(group) else f"{group}:{PORT}"


@pytest.mark.parametrize("group", [SSM, ASM, OF_LINK, UNICAST, IPV4])
def test_every_input_reaches_outputs_of_both_families(line6: Line, relay: Relay, group: str) -> None:
    gen, _, sink = line6.hosts
    options = ("--source", SENDER) if group == SSM else ()
    relay.add("r", place(group), *EVERY_OUTPUT, options=options)
    with ExitStack() as stack:
        socks = [stack.enter_context(listener(sink, output)) for output in EVERY_OUTPUT]
        say(gen, b"payload", group)
        received = [receive(sock)[:2] for sock in socks]
    assert received == [(b"payload", "fd00:2::1"), (b"payload", "fd00:2::1"), *[(b"payload", "10.2.0.1")] * 2]
    assert relay.assert_accounted()["rules"][0]["packets_matched"] == 1


def test_a_group_is_joined_for_its_source_and_takes_no_other(line6: Line, relay: Relay) -> None:
    gen, host, sink = line6.hosts
    relay.add("r", place(SSM), OUT6, options=("--source", SENDER))
    relay.add("other", place(SSM), OUT4, options=("--source", "fd00:1::9"))
    filters = host.run(["cat", "/proc/net/mcfilter6"], capture_output=True).stdout
    for source in (SENDER, "fd00:1::9"):
        assert socket.inet_pton(socket.AF_INET6, source).hex() in filters
    with listener(sink, OUT6) as sock:
        say(gen, b"payload", SSM)
        assert receive(sock)[0] == b"payload"
    matched = {rule["rule_id"]: rule["packets_matched"] for rule in relay.stats()["rules"]}
    assert matched == {"r": 1, "other": 0}


@pytest.mark.parametrize(
    ("group", "output", "suffix", "sent", "arrives"),
    [
        (SSM, OUT6, "", 9, 1),
        (SSM, OUT6, ":7", 9, 7),
        (SSM, OUT6, ":decrement", 9, 8),
        (SSM, "[fd00:2::2]:6002:right", ":decrement", 2, 1),
        (SSM, OUT4, ":decrement", 9, 8),
        (IPV4, OUT6, ":decrement", 9, 8),
    ],
)
def test_the_hop_limit_is_a_ttl(
    line6: Line, relay: Relay, group: str, output: str, suffix: str, sent: int, arrives: int
) -> None:
    gen, _, sink = line6.hosts
    relay.add("r", place(group), output + suffix)
    with listener(sink, output) as sock:
        say(gen, b"payload", group, sent)
        assert receive(sock)[2] == arrives


def test_a_hop_limit_that_reaches_zero_is_dropped_and_counted(line6: Line, relay: Relay) -> None:
    relay.add("r", place(SSM), f"{OUT6}:decrement")
    before = relay.stats()["drops"]["ttl"]
    say(line6.hosts[0], b"payload", SSM, 1)
    wait_until(lambda: relay.stats()["drops"]["ttl"] == before + 1, "the drop is counted")
    relay.assert_accounted()


@pytest.mark.parametrize("output", [OUT6, "[fd00:2::2]:6002:right"])
def test_preserve_source_keeps_the_senders_address(line6: Line, relay: Relay, output: str) -> None:
    gen, _, sink = line6.hosts
    relay.add("r", place(SSM), f"{output}:decrement", options=("--preserve-source",))
    with listener(sink, output) as sock, talker(gen) as out:
        for size in (100, 1200):  # alone, and as a super-frame
            out.setsockopt(socket.IPPROTO_UDP, 103, size)
            out.sendto(bytes(3 * size), (SSM, PORT))
            assert [receive(sock) for _ in range(3)] == [(bytes(size), SENDER, 7)] * 3


def test_preserve_source_with_an_output_of_the_other_family_is_refused(relay: Relay) -> None:
    arguments = ("--input-group", SSM, "--input-port", "5001", "--preserve-source", "--output", OUT4)
    refused = relay.control("add-rule", *arguments)
    assert refused.returncode == 2
    assert "is not IPv6 as the input [ff3e::8000:1]:5001 is" in refused.stderr


def test_super_frames_leave_whole_in_both_families(line6: Line, relay: Relay) -> None:
    gen, _, sink = line6.hosts
    relay.add("r", place(SSM), OUT6, OUT4)
    expected = []
    with talker(gen) as out, listener(sink, OUT6) as six, listener(sink, OUT4) as four:
        for size, count in [(1316, 49), (100, 64), (1452, 30), (1, 64), (700, 3)]:
            train = bytes(i % 251 for i in range(size * count - size // 2))
            expected += [train[at : at + size] for at in range(0, len(train), size)]
            out.setsockopt(socket.IPPROTO_UDP, 103, size)  # UDP_SEGMENT
            out.sendto(train, (SSM, PORT))
        out.setsockopt(socket.IPPROTO_UDP, 103, 0)
        out.sendto(MARK, (SSM, PORT))
        assert receive_until_mark(six) == expected
        assert receive_until_mark(four) == expected
    relay.assert_accounted()


def test_headers_between_are_passed_and_damage_is_counted(line6: Line, relay: Relay) -> None:
    gen, _, sink = line6.hosts
    relay.add("r", place(SSM), OUT6)
    hop, destination = IPv6ExtHdrHopByHop(options=[RouterAlert()]), IPv6ExtHdrDestOpt()
    tagged = datagram(b"tagged")
    sound = [
        datagram(b"plain"),
        ETHERNET / Dot1Q(vlan=5) / tagged.payload,
        datagram(b"options", hop, destination),
        datagram(b"atomic", IPv6ExtHdrFragment(offset=0, m=0)),
    ]
    damaged = {
        "checksum": [datagram(b"none", chksum=0), datagram(b"wrong", chksum=1)],
        "fragment": [datagram(b"part", IPv6ExtHdrFragment(offset=0, m=1, id=7))],
        "parse_error": [datagram(b"long", len=900), datagram(b"many", *[destination] * 9)],
    }
    before = relay.stats()["drops"]
    with listener(sink, OUT6) as sock:
        inject(gen, [*sound, *(packet for packets in damaged.values() for packet in packets), datagram(MARK)])
        assert receive_until_mark(sock) == [b"plain", b"tagged", b"options", b"atomic"]
    drops = relay.assert_accounted()["drops"]
    assert {cause: drops[cause] - before[cause] for cause in damaged} == {c: len(p) for c, p in damaged.items()}


def test_addresses_are_told_in_full(line6: Line, relay: Relay) -> None:
    gen, _, sink = line6.hosts
    relay.add("tv", place("FF3E:0::8000:0001"), OUT6)
    relay.ask("log-level", "set", "debug", "--facility", "Ingress")
    with talker(gen) as out, listener(sink, OUT6) as sock:
        out.sendto(b"payload", (SSM, PORT))
        receive(sock)
        told = f"[{SENDER}]:{out.getsockname()[1]}"
        (stream,) = relay.stats()["rules"][0]["streams"]
        assert (stream["source"], stream["destination"]) == (told, place(SSM))
        assert told in relay.control("streams").stdout
        relay.wait_for_log(f"First packet of rule tv from {told}")
        wait_until(
            lambda: out.sendto(b"payload", (SSM, PORT)) and f"from {told} to {place(SSM)}" in relay.text(), "traced"
        )
    relay.ask("log-level", "set", "info", "--facility", "Ingress")
    (rule,) = relay.ask("list-rules")
    assert rule["input_group"] == SSM
    assert place(SSM) in relay.control("list-rules").stdout
    assert OUT6 in relay.control("list-rules").stdout


def test_what_the_relay_sent_itself_is_not_taken_in_again(line6: Line, relay: Relay) -> None:
    """On lo, where it comes back: once to the output, and no more."""
    host = line6.hosts[1]
    relay.add("one", "[ff3e::1:1]:5001", "[ff3e::1:2]:5002:lo", options=("--input-interface", "lo"))
    relay.add("two", "[ff3e::1:2]:5002", "[ff3e::1:3]:5003:lo", options=("--input-interface", "lo"))
    before = relay.stats()["drops"]["own_egress"]
    with host.inside():
        out = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        index = socket.if_nametoindex("lo")
    with out:
        out.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
        for _ in range(3):
            out.sendto(b"payload", ("ff3e::1:1", 5001))
    wait_until(lambda: relay.stats()["drops"]["own_egress"] == before + 3, "own egress is recognised")
    stats = relay.assert_accounted()
    assert [rule["packets_matched"] for rule in stats["rules"]] == [3, 0]


def test_two_legs_of_either_family_become_one_stream(line6: Line, relay: Relay) -> None:
    gen, _, sink = line6.hosts
    protected = ("--secondary", place(IPV4), "--protection", "seamless")
    relay.add("six", place(SSM), OUT6, options=(*protected, "--input-interface", "left"))
    packets = [struct.pack(">BBHII", 0x80, 33, number, number * 90, 7) + bytes(100) for number in range(20)]
    with talker(gen) as six, talker(gen, socket.AF_INET) as four, listener(sink, OUT6) as sock:
        for number, packet in enumerate(packets):
            for out, group, loses in ((six, SSM, 3), (four, IPV4, 7)):
                if number % 10 != loses:
                    out.sendto(packet, (group, PORT))
        assert [receive(sock)[0] for _ in packets] == packets
        told = relay.stats()
    (rule,) = told["rules"]
    assert (rule["packets_matched"], rule["protection"]["withheld"]) == (20, 16)
    assert place(IPV4) in relay.control("list-rules").stdout


@contextmanager
def whole(line: Line, relay: Relay, folder: Path, *outputs: str) -> Iterator[None]:
    """Traffic to SSM at PPS from before the block until after it: it arrives at each output whole, in order, once."""
    gen, _, sink = line.hosts
    to = ("--group", SSM, "--port", str(PORT), "--interface", "right", "--rate", str(PPS), "--flows", "8")
    with ExitStack() as stack:
        received = []
        for output in outputs:
            group, port = split_place(output.rpartition(":")[0])
            options = ("--group", group, "--port", port, "--interface", "left")
            received.append(stack.enter_context(receiver(sink, folder, *options)))
        sent = stack.enter_context(sender(gen, folder, *to))
        yield
        count = sent.interrupt()["datagrams"]
        summaries = [each.drain(count) for each in received]
        print(relay.stats()["drops"])  # shown when the test failed
        for summary in summaries:
            assert_perfect(summary, count)


def worker_pid(relay: Relay) -> int:
    return int(relay.stats()["workers"][0]["pid"])


def test_nothing_is_lost_when_processes_change(line6: Line, relay: Relay, tmp_path: Path) -> None:
    """A worker that is killed, then a graceful restart of all."""
    relay.add("r", place(SSM), OUT6, OUT4, options=("--source", SENDER))
    with whole(line6, relay, tmp_path, OUT6, OUT4):
        for change in (kill_worker, restart):
            wait_for_traffic(relay)
            former = worker_pid(relay)
            change(relay, former)
            wait_until(partial(is_replaced, relay, former), "another worker runs")
        wait_for_traffic(relay)
    relay.assert_accounted()


def is_replaced(relay: Relay, former: int) -> bool:
    return worker_pid(relay) not in (0, former)


def kill_worker(relay: Relay, pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def restart(relay: Relay, pid: int) -> None:
    assert relay.control("restart", "--graceful").returncode == 0


def wait_for_traffic(relay: Relay) -> None:
    goal = relay.stats()["packets_relayed"] + PPS // 4
    wait_until(lambda: relay.stats()["packets_relayed"] > goal, "traffic flows")


def test_an_output_waits_for_an_address_that_nobody_else_has(line6: Line, relay: Relay) -> None:
    """Without IPv6 it waits and says so, while IPv4 goes on; tentative addresses are not enough."""
    gen, host, sink = line6.hosts
    relay.add("r", place(SSM), OUT6, OUT4)
    host.ip("-6", "addr", "flush", "dev", "right")
    try:
        reason = "waiting: interface right has no IPv6 address"
        wait_until(lambda: relay.stats()["rules"][0]["state"] == reason, "it waits")
        with listener(sink, OUT4) as four:
            say(gen, b"payload", SSM)
            assert receive(four)[0] == b"payload"
        assert relay.stats()["drops"]["send_error"] >= 1
    finally:
        host.ip("addr", "add", "fd00:2::1/64", "dev", "right")
    wait_until(lambda: relay.stats()["rules"][0]["state"] == "active", "it goes on by itself")
    assert "tentative" not in host.run(["ip", "-6", "addr", "show", "dev", "right"], capture_output=True).stdout
    with listener(sink, OUT6) as six:
        say(gen, b"payload", SSM)
        assert receive(six)[:2] == (b"payload", "fd00:2::1")
