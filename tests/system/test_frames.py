"""Frames as no socket makes them: tags, options, fragments, and every kind of damage.

    gen ──left── relay ──right── sink

A frame is put on the cable by a packet socket in gen; what leaves the relay is read from a UDP socket in sink.
"""

import random
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
from scapy.layers.inet import IP, UDP, IPOption, fragment
from scapy.layers.l2 import Dot1AD, Dot1Q, Ether
from scapy.packet import Packet, Raw

from relay.addresses import is_multicast
from tests.system.conftest import StartRelay
from tests.system.harness import Relay, wait_until
from tools.netns import Host, Line

GROUP, PORT = "239.1.1.1", 5001
OUT_GROUP, OUT_PORT = "239.2.2.2", 6001
SOURCE = "10.1.0.1"
ETHERNET = Ether(src="02:00:00:00:00:01", dst="01:00:5e:01:01:01")
MARK = b"the last frame"
MUTATIONS = 100_000


@contextmanager
def listener(host: Host, group: str = OUT_GROUP, port: int = OUT_PORT) -> Iterator[socket.socket]:
    """A socket in a namespace that hears what the relay sends."""
    with host.inside():
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        index = socket.if_nametoindex("left")
    with sock:
        sock.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
        sock.bind((group, port))
        if is_multicast(group):
            mreqn = struct.pack("@4s4si", socket.inet_aton(group), bytes(4), index)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, mreqn)
        sock.settimeout(10)
        yield sock


def inject(host: Host, frames: Sequence[bytes], pause: Callable[[int], None] = lambda _: None) -> None:
    """Put frames on the cable; `pause` is called after each with its number."""
    with host.inside():
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        sock.bind(("right", 0))
    with sock:
        for number, frame in enumerate(frames):
            sock.send(frame)
            pause(number)


def receive_until_mark(sock: socket.socket) -> list[bytes]:
    """Every payload before the one that says it is the last."""
    payloads = []
    while (payload := sock.recv(65_535)) != MARK:
        payloads.append(payload)
    return payloads


def datagram(payload: bytes, **ip: object) -> Packet:
    return IP(src=SOURCE, dst=GROUP, ttl=8, **ip) / UDP(sport=4000, dport=PORT) / Raw(payload)  # type: ignore[arg-type]


def relayed(line: Line, frames: Sequence[bytes]) -> list[bytes]:
    """What leaves the relay when `frames` come in."""
    gen, _, sink = line.hosts
    with listener(sink) as sock:
        inject(gen, [*frames, bytes(ETHERNET / datagram(MARK))])
        return receive_until_mark(sock)


@pytest.fixture
def relay(line: Line, start_relay: StartRelay) -> Relay:
    relay = start_relay(line.hosts[1])
    relay.add("r1", f"{GROUP}:{PORT}", f"{OUT_GROUP}:{OUT_PORT}:right")
    return relay


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(ETHERNET / datagram(b"plain"), id="plain"),
        pytest.param(ETHERNET / Dot1Q(vlan=5) / datagram(b"plain"), id="vlan"),
        pytest.param(ETHERNET / Dot1AD(vlan=7) / Dot1Q(vlan=5) / datagram(b"plain"), id="qinq"),
        pytest.param(ETHERNET / Dot1Q(vlan=7) / Dot1Q(vlan=5) / datagram(b"plain"), id="two 802.1Q tags"),
        pytest.param(ETHERNET / datagram(b"plain", options=[IPOption(b"\x94\x04\0\0")]), id="router alert"),
        pytest.param(ETHERNET / datagram(b"plain", options=[IPOption(b"\x01" * 40)]), id="longest options"),
        pytest.param(ETHERNET / datagram(b"plain") / Raw(b"\0" * 30), id="padded"),
        pytest.param(
            ETHERNET / IP(src=SOURCE, dst=GROUP) / UDP(sport=4000, dport=PORT, chksum=0) / Raw(b"plain"),
            id="no checksum",
        ),
    ],
)
def test_sound_frames_are_relayed_unaltered(line: Line, relay: Relay, frame: Packet) -> None:
    raw = bytes(frame)
    if frame.lastlayer().load == b"\0" * 30:
        raw = bytes(ETHERNET / datagram(b"plain")) + bytes(30)  # behind the datagram, as Ethernet pads
    assert relayed(line, [raw]) == [b"plain"]
    relay.assert_accounted()


def test_fragments_in_any_order_are_relayed_as_one_datagram(line: Line, relay: Relay) -> None:
    shuffle = random.Random(1)
    payloads = [bytes([i]) * (2000 + 300 * i) for i in range(12)]
    frames = []
    for i, payload in enumerate(payloads):
        fragments = fragment(datagram(payload, id=i + 1), fragsize=1400)  # type: ignore[no-untyped-call]
        shuffle.shuffle(fragments)
        frames += [bytes(ETHERNET / part) for part in fragments]
    assert relayed(line, frames) == payloads
    relay.assert_accounted()


@pytest.mark.parametrize(
    ("frame", "cause"),
    [
        pytest.param(bytes(ETHERNET / datagram(b"x" * 40))[:50], "parse_error", id="cut in the payload"),
        pytest.param(bytes(ETHERNET / datagram(b"x" * 40))[:36], "parse_error", id="cut in the UDP header"),
        pytest.param(bytes(ETHERNET / datagram(b"x", len=4000)), "parse_error", id="IP length over the frame"),
        pytest.param(bytes(ETHERNET / datagram(b"x", len=24)), "parse_error", id="IP length under the headers"),
        pytest.param(
            bytes(ETHERNET / IP(src=SOURCE, dst=GROUP) / UDP(sport=1, dport=PORT, len=7) / Raw(b"x")),
            "parse_error",
            id="UDP length 7",
        ),
        pytest.param(
            bytes(ETHERNET / IP(src=SOURCE, dst=GROUP) / UDP(sport=1, dport=PORT, len=99) / Raw(b"x")),
            "parse_error",
            id="UDP length over the packet",
        ),
        pytest.param(
            bytes(ETHERNET / IP(src=SOURCE, dst=GROUP) / UDP(sport=1, dport=PORT, chksum=1) / Raw(b"x")),
            "checksum",
            id="wrong UDP checksum",
        ),
        pytest.param(bytes(ETHERNET / datagram(b"x", chksum=1)), "checksum", id="wrong IP checksum"),
    ],
)
def test_damaged_frames_are_dropped_and_counted(line: Line, relay: Relay, frame: bytes, cause: str) -> None:
    assert relayed(line, [frame]) == []
    drops = relay.assert_accounted()["drops"]
    assert drops[cause] == 1, drops


def test_random_mutations_never_let_a_wrong_byte_out(line: Line, relay: Relay) -> None:
    """A mutated frame leaves as its own checksum says it was sent, or not at all."""
    dice = random.Random(2)
    payload = bytes(dice.randrange(256) for _ in range(200))
    sound = bytes(ETHERNET / datagram(payload))
    frames = [mutate(sound, dice) for _ in range(MUTATIONS)]
    gen, _, sink = line.hosts
    received: list[bytes] = []

    with listener(sink) as sock:

        def keep_up(number: int) -> None:
            """Let the relay catch up: a full ring is another test's matter."""
            if number % 2000 == 1999:
                inject(gen, [bytes(ETHERNET / datagram(MARK))])
                received.extend(receive_until_mark(sock))

        inject(gen, frames, keep_up)
    assert all(is_plausible(payload, out) for out in received)
    assert relay.process.poll() is None
    stats = relay.assert_accounted()
    assert stats["drops"]["checksum"] > 0
    assert stats["drops"]["parse_error"] > 0
    assert stats["packets_relayed"] == len(received) + MUTATIONS // 2000
    relay.stop()


def mutate(frame: bytes, dice: random.Random) -> bytes:
    """A frame with some bytes changed, or cut, or both; its addresses mostly stay, so that it gets far."""
    changed = bytearray(frame)
    for _ in range(dice.choice((1, 1, 2, 4))):
        place = dice.randrange(12, len(changed)) if dice.random() < 0.7 else dice.randrange(12, 42)
        changed[place] = dice.randrange(256)
    if dice.random() < 0.2:
        del changed[dice.randrange(14, len(changed)) :]
    return bytes(changed)


def is_plausible(payload: bytes, out: bytes) -> bool:
    """Whether what left is the payload, or one that the mutated headers vouch for.

    Without a checksum (its two bytes became 0) nobody can tell a changed byte; the length is the headers' own.
    """
    differing = sum(a != b for a, b in zip(payload, out, strict=False))
    return len(out) <= len(payload) and differing <= 4


def test_super_frames_are_relayed_whole(line: Line, relay: Relay) -> None:
    gen, _, sink = line.hosts
    with gen.inside():
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        index = socket.if_nametoindex("right")
    sizes = [(1316, 49), (100, 64), (1472, 30), (1, 64), (700, 3)]
    expected = []
    with sender, listener(sink) as sock:
        mreqn = struct.pack("@4s4si", bytes(4), bytes(4), index)
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, mreqn)
        for size, count in sizes:
            train = bytes(i % 251 for i in range(size * count - size // 2))
            expected += [train[at : at + size] for at in range(0, len(train), size)]
            sender.setsockopt(socket.IPPROTO_UDP, 103, size)  # UDP_SEGMENT
            sender.sendto(train, (GROUP, PORT))
        sender.setsockopt(socket.IPPROTO_UDP, 103, 0)
        sender.sendto(MARK, (GROUP, PORT))
        received = receive_until_mark(sock)
    assert received == expected
    assert relay.assert_accounted()["packets_in"] == len(expected) + 1


def test_every_small_size_is_relayed_whole(line: Line, relay: Relay) -> None:
    payloads = [bytes((i * 7 + j) % 256 for j in range(i)) for i in range(260)]
    assert relayed(line, [bytes(ETHERNET / datagram(payload)) for payload in payloads]) == payloads
    wait_until(lambda: relay.stats()["packets_relayed"] == len(payloads) + 1, "all counted")
