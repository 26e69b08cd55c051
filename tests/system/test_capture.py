"""`mcrctl capture` of a relay under traffic: tshark counts exactly what was sent, and the relay loses nothing.

gen ──left── relay ──right── sink        10.1.0.0/24, 10.2.0.0/24
"""

import contextlib
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Raw

from tests.system.conftest import StartRelay
from tests.system.harness import BIN, DEADLINE_S, Relay, assert_perfect, receiving, send, wait_until
from tests.system.test_rules import listener, sender
from tools.netns import Line

COUNT = 3000
RATE = "10000"
IN, OUT, UNICAST = ("239.1.1.1", 5001), ("239.2.2.2", 6001), ("10.2.0.2", 7001)
FIELDS = ("frame.interface_name", "frame.packet_flags_direction", "ip.dst", "udp.dstport", "udp.length")
SUMS = ("ip.checksum.status", "udp.checksum.status")
GOOD = "1"
MAC = "02:00:00:00:00:01"
INBOUND, OUTBOUND = "0x00000001", "0x00000002"


class Capture:
    """A running capture; in the block it has begun."""

    def __init__(self, relay: Relay, folder: Path, rule_id: str, *options: str) -> None:
        number = len(list(folder.iterdir()))
        self.file = folder / f"capture-{number}.pcapng"
        self._errors = folder / f"capture-{number}.err"
        command = [str(BIN / "mcrctl"), "--socket", str(relay.socket), "capture", rule_id, "-o", str(self.file)]
        with self._errors.open("w") as errors:
            self.process = relay.host.popen([*command, *options], stderr=errors)
        wait_until(lambda: "capturing on" in self.said() or self.process.poll() is not None, "the capture began")
        assert self.process.poll() is None, self.said()

    def said(self) -> str:
        """What it said so far."""
        return self._errors.read_text()

    def wait(self) -> str:
        """Wait for its end, return what it said."""
        assert self.process.wait(DEADLINE_S) == 0, self.said()
        return self.said()


@contextlib.contextmanager
def capturing(relay: Relay, folder: Path, rule_id: str, *options: str) -> Iterator[Capture]:
    """Capture, at most until the block ends."""
    capture = Capture(relay, folder, rule_id, *options)
    try:
        yield capture
    finally:
        if capture.process.poll() is None:
            capture.process.terminate()
            capture.process.wait()


def dissect(file: Path, *fields: str) -> list[tuple[str, ...]]:
    """These fields of every packet as tshark reads them, checksums verified, fragments left alone."""
    options = ("-o", "ip.check_checksum:TRUE", "-o", "udp.check_checksum:TRUE", "-o", "ip.defragment:FALSE")
    names = [word for name in fields for word in ("-e", name)]
    command = ["tshark", "-n", "-r", str(file), *options, "-T", "fields", *names]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return [tuple(line.split("\t")) for line in result.stdout.splitlines()]


def statistics(file: Path) -> list[dict[int, int]]:
    """The counters in each interface statistics block, by option code."""
    data, at, found = file.read_bytes(), 0, []
    while at < len(data):
        kind, total = (int.from_bytes(data[at + i : at + i + 4], "little") for i in (0, 4))
        if kind == 5:
            options, place = {}, at + 20
            while code := int.from_bytes(data[place : place + 2], "little"):
                length = int.from_bytes(data[place + 2 : place + 4], "little")
                options[code] = int.from_bytes(data[place + 4 : place + 4 + length], "little")
                place += 4 + (length + 3) // 4 * 4
            found.append(options)
        at += total
    assert at == len(data), "the last block is whole"
    return found


def expected(sides: Sequence[tuple[str, str, tuple[str, int]]], payload_bytes: int = 1316) -> Counter[Any]:
    """Every datagram once on each side, with good sums."""
    length = str(8 + payload_bytes)
    return Counter({(name, way, group, str(port), length, GOOD, GOOD): COUNT for name, way, (group, port) in sides})


BOTH = (("left", INBOUND, IN), ("right", OUTBOUND, OUT), ("right", OUTBOUND, UNICAST))


def test_both_sides_are_captured_whole_and_the_relay_loses_nothing(
    line: Line, start_relay: StartRelay, tmp_path: Path
) -> None:
    gen, host, sink = line.hosts
    relay = start_relay(host, ("left",), 1, "--exclusive")  # what is dropped there is behind the tap
    relay.add("tv", ":".join(map(str, IN)), "239.2.2.2:6001:right", "10.2.0.2:7001:right")
    relay.add("other", "239.1.1.2:5001", "239.2.2.3:6001:right")
    with receiving(sink, tmp_path, "--interface", "left", "--idle-timeout", "2") as summary:
        with capturing(relay, tmp_path, "tv", "--count", str(3 * COUNT)) as capture:
            other = ["--group", "239.1.1.2", "--count", "200", "--rate", RATE]
            send(gen, "--interface", "right", *other)
            send(gen, "--interface", "right", "--rate", RATE, "--count", str(COUNT))
            said = capture.wait()
        assert_perfect(summary(COUNT), COUNT)
    assert f"{3 * COUNT} packets captured. left: {COUNT} packets, 0 frames lost by the kernel; right: " in said
    packets = dissect(capture.file, "frame.time_epoch", *FIELDS, *SUMS)
    assert Counter(packet[1:] for packet in packets) == expected(BOTH)
    assert packets == sorted(packets, key=lambda packet: float(packet[0]))
    left, right = statistics(capture.file)
    assert (left[8], right[8]) == (COUNT, 2 * COUNT)  # isb_usrdeliv
    assert all(counts[4] == counts[6] > 0 == counts[5] == counts[7] for counts in (left, right))
    relay.assert_accounted()
    relay.stop()


def test_a_capture_is_cut_chosen_and_ended_as_one_likes(line: Line, start_relay: StartRelay, tmp_path: Path) -> None:
    gen, host, _ = line.hosts
    relay = start_relay(host)
    relay.add("tv", ":".join(map(str, IN)), "239.2.2.2:6001:right")
    # One side, cut; SIGINT ends it, and what the kernel had not yet handed over is in the file.
    with (
        capturing(relay, tmp_path, "tv", "--side", "egress", "--snaplen", "60") as egress,
        capturing(relay, tmp_path, "tv", "--side", "ingress", "--seconds", "600") as ingress,
    ):
        send(gen, "--interface", "right", "--rate", "max", "--count", "500")
        wait_until(lambda: relay.stats()["packets_relayed"] == 500, "all are relayed")
        for capture in (egress, ingress):
            capture.process.send_signal(signal.SIGINT)
            assert "500 packets captured" in capture.wait()
    assert Counter(dissect(egress.file, "frame.interface_name", "frame.cap_len", "frame.len")) == {
        ("right", "60", str(1316 + 42)): 500
    }
    assert Counter(dissect(ingress.file, "frame.interface_name", "frame.cap_len")) == {("left", str(1316 + 42)): 500}
    # Fragments come as they are on the wire, each side's three.
    with capturing(relay, tmp_path, "tv", "--count", "6") as capture, listener(line.hosts[2], *OUT) as sock:
        with sender(gen) as out:
            out.sendto(bytes(4000), IN)
        assert len(sock.recv(65_536)) == 4000
        capture.wait()
    assert Counter(dissect(capture.file, "frame.interface_name", "frame.len")) == {
        (name, str(14 + 20 + size)): times for name in ("left", "right") for size, times in ((1480, 2), (1048, 1))
    }
    # A tag that the kernel took out is put back.
    tagged = Ether(src=MAC, dst="01:00:5e:01:01:01") / Dot1Q(vlan=7, prio=3) / IP(src="10.1.0.1", dst=IN[0], ttl=9)
    with capturing(relay, tmp_path, "tv", "--count", "2") as capture, gen.inside():
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
            raw.bind(("right", 0))
            raw.send(bytes(tagged / UDP(sport=4000, dport=IN[1]) / Raw(b"tagged")))
        capture.wait()
    assert Counter(dissect(capture.file, "frame.interface_name", "vlan.id", "vlan.priority", "udp.length")) == {
        ("left", "7", "3", "14"): 1,
        ("right", "", "", "14"): 1,
    }
    # Standard output, and a time that is over.
    piped = tmp_path / "piped.pcapng"
    command = [str(BIN / "mcrctl"), "--socket", str(relay.socket), "capture", "tv", "-o", "-", "--seconds", "0.2"]
    with piped.open("wb") as out:
        over = relay.host.run(command, stdout=out, stderr=subprocess.PIPE)
    assert over.returncode == 0
    assert "0 packets captured" in over.stderr
    assert dissect(piped, "frame.len") == []
    # What is refused is one line.
    for arguments, message in (
        (("nothing", "-o", "x"), "no rule nothing: `mcrctl list-rules` shows those there are"),
        (("tv", "-o", "/nowhere/x"), "/nowhere/x: No such file or directory: give another file with -o"),
    ):
        refused = relay.control("capture", *arguments)
        assert (refused.returncode, refused.stderr) == (1, f"mcrctl: {message}\n")
    full = relay.control("capture", "tv", "-o", "/dev/full", "--seconds", "0.2")
    assert full.returncode == 1
    assert full.stderr.splitlines()[-1] == "mcrctl: /dev/full: No space left on device: the capture ends there"
    without = ["setpriv", "--bounding-set=-net_raw", "--inh-caps=-net_raw", str(BIN / "mcrctl")]
    weak = relay.host.run(
        [*without, "--socket", str(relay.socket), "capture", "tv", "-o", str(tmp_path / "weak")], capture_output=True
    )
    remedy = "no CAP_NET_RAW for packet sockets: run `sudo mcrctl capture …`, or grant it"
    assert (weak.returncode, weak.stderr) == (1, f"mcrctl: {remedy}\n")
