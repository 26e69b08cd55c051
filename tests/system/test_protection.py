"""Rules with two legs, under traffic: what either leg brings leaves once, and nothing else notices.

      ┌─ left ───────┐
gen ──┤              ├── relay ──right── sink        10.1.0.0/24, 10.3.0.0/24, 10.2.0.0/24
      └─ spare ──────┘
"""

import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from tests.system.conftest import StartRelay
from tests.system.harness import Relay, wait_until
from tools.netns import Host, Line

GROUP, PORT = "239.1.1.1", 5001
OUT, OUT_PORT, OTHER_PORT = "239.2.2.2", 6001, 6002
PAYLOAD_BYTES = 200
PPS = 4000
BURST = 16
UDP_SEGMENT = 103
LEGS = ("left", "spare")


@pytest.fixture
def forked(line: Line) -> Line:
    """The line with a second cable between gen and relay, `spare` at the relay and `right2` at gen."""
    gen, relay, _ = line.hosts
    gen.ip("link", "add", "right2", "type", "veth", "peer", "name", "spare", "netns", relay.namespace)
    for host, name, address in ((gen, "right2", "10.3.0.1/24"), (relay, "spare", "10.3.0.2/24")):
        host.ip("addr", "add", address, "dev", name)
        host.ip("link", "set", name, "up")
    return line


def datagram(number: int) -> bytes:
    header = struct.pack(">BBHIIQ", 0x80, 33, number & 0xFFFF, number * 90 & 0xFFFFFFFF, 7, number)
    return header.ljust(PAYLOAD_BYTES, b".")


class Legs(threading.Thread):
    """Sends one RTP stream by two legs from gen, each of which loses other datagrams, until it is told to end.

    In bursts, of which what a leg does not lose is one super-frame, larger than a slot of the ring.
    """

    def __init__(self, gen: Host, addresses: tuple[str, str] = ("10.1.0.1", "10.3.0.1")) -> None:
        super().__init__()
        self.sockets = []
        for address in addresses:
            with gen.inside():
                sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(address))
            sock.bind((address, 0))
            sock.connect((GROUP, PORT))
            self.sockets.append(sock)
        self.loses: Callable[[int, int], bool] = lambda leg, number: number % 10 == 3 + 4 * leg
        self.cut = [False, False]
        self.sent = 0
        self.numbers_of: list[list[int]] = [[], []]
        self.ending = threading.Event()
        self.failure: BaseException | None = None

    def run(self) -> None:
        start_s = time.monotonic()
        try:
            while not self.ending.is_set():
                while self.sent + BURST < (time.monotonic() - start_s) * PPS and not self.ending.is_set():
                    self.send()
                self.ending.wait(BURST / PPS)
        except BaseException as error:
            self.failure = error

    def send(self) -> None:
        burst = range(self.sent, self.sent + BURST)
        segmented = [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", PAYLOAD_BYTES))]
        for leg, sock in enumerate(self.sockets):
            numbers = [number for number in burst if not self.cut[leg] and not self.loses(leg, number)]
            if numbers:
                sock.sendmsg([b"".join(map(datagram, numbers))], segmented)
            self.numbers_of[leg] += numbers
        self.sent += BURST

    def goes_on(self, count: int = PPS // 4) -> None:
        """Wait until so many more have been sent."""
        until = self.sent + count
        wait_until(lambda: self.sent >= until or self.failure, f"{count} more datagrams are sent")
        assert self.failure is None

    def end(self) -> int:
        self.ending.set()
        self.join()
        assert self.failure is None
        return self.sent

    def close(self) -> None:
        self.ending.set()
        if self.is_alive():
            self.join()
        for sock in self.sockets:
            sock.close()


class Receiver(threading.Thread):
    """Takes in what arrives at the sink."""

    def __init__(self, sink: Host, port: int = OUT_PORT) -> None:
        super().__init__()
        with sink.inside():
            self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            index = socket.if_nametoindex("left")
        self.socket.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
        self.socket.bind((OUT, port))
        mreqn = struct.pack("@4s4si", socket.inet_aton(OUT), bytes(4), index)
        self.socket.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, mreqn)
        self.socket.settimeout(0.2)
        self.numbers: list[int] = []
        self.sources: set[str] = set()
        self.ending = threading.Event()

    def run(self) -> None:
        while not self.ending.is_set():
            try:
                payload = self.socket.recv(2048)
            except TimeoutError:
                continue
            self.numbers.append(struct.unpack_from(">Q", payload, 12)[0])

    def close(self) -> None:
        self.ending.set()
        self.join()
        self.socket.close()


@pytest.fixture
def sending(forked: Line) -> Iterator[Legs]:
    legs = Legs(forked.hosts[0])
    yield legs
    legs.close()


@pytest.fixture
def received(forked: Line) -> Iterator[Receiver]:
    receiver = Receiver(forked.hosts[2])
    receiver.start()
    yield receiver
    receiver.close()


@pytest.fixture
def others(forked: Line) -> Iterator[Receiver]:
    receiver = Receiver(forked.hosts[2], OTHER_PORT)
    receiver.start()
    yield receiver
    receiver.close()


def protect(relay: Relay, protection: str, *options: str) -> None:
    """A rule `tv` of both legs."""
    legs = ("--input-interface", "left", "--secondary", "::spare", "--protection", protection)
    relay.add("tv", f"{GROUP}:{PORT}", f"{OUT}:{OUT_PORT}:right", options=(*legs, *options))


def rule_of(relay: Relay, rule_id: str = "tv") -> Any:
    return next(rule for rule in relay.stats()["rules"] if rule["rule_id"] == rule_id)


def assert_whole(received: Receiver, first: int, sent: int) -> None:
    """Every datagram from the first on, once."""

    def from_first() -> list[int]:
        return [number for number in list(received.numbers) if number >= first]

    wait_until(lambda: len(from_first()) >= sent - first, f"{sent - first} datagrams, {len(from_first())} came")
    assert sorted(from_first()) == list(range(first, sent))


def replace_by_kill(relay: Relay, core: int) -> None:
    """Kill a worker; another has its rings then."""

    def worker() -> Any:
        return next(worker for worker in relay.stats()["workers"] if worker["core"] == core)

    former = worker()
    psutil.Process(former["pid"]).kill()
    wait_until(
        lambda: worker()["restarts"] > former["restarts"] and worker()["state"] == "running", "another worker runs"
    )


def test_what_either_leg_brings_leaves_once_whatever_befalls_the_relay(
    forked: Line, start_relay: StartRelay, sending: Legs, received: Receiver, others: Receiver
) -> None:
    """Each leg loses its own tenth. A worker is killed, the supervisor starts anew, a leg is cut off; nothing is lost.

    Another rule has the secondary's input before and after it is protected, and all that comes by it.
    """
    relay = start_relay(forked.hosts[1], LEGS, 2)
    relay.add("other", f"{GROUP}:{PORT}", f"{OUT}:{OTHER_PORT}:right", options=("--input-interface", "spare"))
    sending.start()
    sending.goes_on()
    protect(relay, "seamless")
    sending.goes_on(20)  # on the way when it was added
    first = sending.sent
    sending.goes_on()
    for _ in range(2):
        replace_by_kill(relay, relay.cores(2)[0])
        sending.goes_on()
    assert relay.control("restart", "--graceful").returncode == 0
    sending.goes_on()
    sending.loses = lambda leg, number: leg == 0 and number % 10 == 3
    sending.goes_on(20)
    forked.hosts[1].ip("link", "set", "left", "down")
    sending.goes_on()
    assert rule_of(relay)["state"] == "active"
    relay.wait_for_log(f"Nothing comes by the primary leg {GROUP}:{PORT} on left of rule tv: it is not protected")
    forked.hosts[1].ip("link", "set", "left", "up")
    relay.wait_for_log(f"The primary leg {GROUP}:{PORT} on left of rule tv delivers again after")
    sending.goes_on()
    sent = sending.end()
    assert_whole(received, first, sent)

    # What the other rule got: each datagram of the leg, the one or other of them twice where its input changed rings.
    wait_until(lambda: len(set(others.numbers)) >= len(sending.numbers_of[1]), "all of the other rule's")
    assert set(others.numbers) == set(sending.numbers_of[1])
    assert all(number < first for number, times in Counter(others.numbers).items() if times > 1)

    rule = rule_of(relay)
    stats = relay.assert_accounted()
    primary, secondary = rule["protection"]["legs"]
    assert rule["protection"]["mode"] == "seamless"
    assert primary["firsts"] + secondary["firsts"] == rule["packets_matched"]
    assert primary["packets"] + secondary["packets"] == rule["packets_matched"] + rule["protection"]["withheld"]
    assert stats["packets_withheld"] == rule["protection"]["withheld"] > 0
    assert sum(stats["drops"].values()) == 0
    words = ("--rule-id", "radio", "--input-group", GROUP, "--input-port", str(PORT), "--secondary", "239.1.1.2:5001")
    refused = relay.control("add-rule", *words, "--protection", "seamless", "--output", f"{OUT}:7000:right")
    assert refused.returncode != 0
    assert "rules tv and radio both protect 239.1.1.1:5001 on left" in refused.stderr


def test_the_secondary_takes_over_and_hands_back(
    forked: Line, start_relay: StartRelay, sending: Legs, received: Receiver
) -> None:
    """With one worker. What is lost is what the stall takes, and nothing is doubled."""
    relay = start_relay(forked.hosts[1], LEGS)
    protect(relay, "failover", "--stall-ms", "200")
    sending.loses = lambda leg, number: False
    sending.start()
    sending.goes_on()
    assert rule_of(relay)["protection"]["active"] == "primary"
    cut_at = sending.sent
    sending.cut[0] = True
    relay.wait_for_log("Rule tv went over to its secondary leg 239.1.1.1:5001 on spare")
    sending.goes_on()
    assert rule_of(relay)["protection"]["active"] == "secondary"
    assert "went over to the secondary leg" in relay.control("doctor", "--seconds", "0.1").stdout
    sending.cut[0] = False
    relay.wait_for_log("Rule tv is back on its primary leg 239.1.1.1:5001 on left")
    sending.goes_on()
    sent = sending.end()
    wait_until(lambda: sent - 1 in received.numbers, "the last datagram")
    assert len(set(received.numbers)) == len(received.numbers)
    missing = sorted(set(range(sent)) - set(received.numbers))
    assert missing == list(range(missing[0], missing[-1] + 1))
    assert missing[0] >= cut_at
    protection = rule_of(relay)["protection"]
    assert (protection["active"], protection["switches"]) == ("primary", 2)
    assert protection["withheld"] + len(received.numbers) == sum(map(len, sending.numbers_of))
    assert relay.text().count("went over to its secondary") == relay.text().count("is back on its primary") == 1
