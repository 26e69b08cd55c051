"""What is wrong with a stream before the relay is told by the relay, exactly; nothing is told of a stream that is well.

gen ──left── relay ──right── sink        10.1.0.0/24, 10.2.0.0/24
"""

import os
import re
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.relay.dataplane.test_mpegts import cell
from tests.system.conftest import StartRelay
from tests.system.harness import Relay, wait_until
from tools.netns import Host, Line

RTP, TS, PLAIN = 5001, 5002, 5003
PACKET_TICKS = 90  # 1 ms at 90 kHz
PCR_TICKS = 27_000 * 20
NO_RTP_FAULT = dict.fromkeys(("lost", "reordered", "duplicates", "ssrc_changes", "sequence_restarts"), 0)
NO_TS_FAULT = dict.fromkeys(
    (
        *("sync_byte_errors", "sync_losses", "transport_errors", "continuity_errors", "packets_untracked"),
        *("pcr_discontinuities",),
    ),
    0,
)


class Sender:
    """Sends datagrams one by one, each a message of its own."""

    def __init__(self, host: Host, port: int) -> None:
        with host.inside():
            self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("10.1.0.1"))
        self.socket.connect(("239.1.1.1", port))
        self.name = f"10.1.0.1:{self.socket.getsockname()[1]}"
        self.sent = 0

    def send(self, *datagrams: bytes, pace_s: float = 0.0) -> None:
        for datagram in datagrams:
            self.socket.send(datagram)
            self.sent += 1
            time.sleep(pace_s)

    def __enter__(self) -> "Sender":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


@pytest.fixture
def relay(line: Line, start_relay: StartRelay) -> Relay:
    relay = start_relay(line.hosts[1])
    for rule_id, port in (("rtp", RTP), ("ts", TS), ("plain", PLAIN)):
        relay.add(rule_id, f"239.1.1.1:{port}", f"239.2.2.2:{port}:right")
    return relay


def stream_of(relay: Relay, rule_id: str, sender: Sender) -> Any:
    """The one stream of a rule, once everything that was sent has been seen."""

    def seen() -> Any:
        (found,) = [relay.ask("streams", rule_id)[rule_id]]
        return found if sum(stream["packets"] for stream in found) >= sender.sent else None

    (stream,) = wait_until(seen, f"{sender.sent} datagrams of {rule_id}")
    assert stream["packets"] == sender.sent
    assert (stream["source"], stream["interface"]) == (sender.name, "left")
    return stream


def rtp(sequence: int, ssrc: int = 7, content: bytes = bytes(160)) -> bytes:
    timestamp = sequence * PACKET_TICKS & 0xFFFFFFFF
    return struct.pack(">BBHII", 0x80, 33, sequence & 0xFFFF, timestamp, ssrc) + content


def faults_of(told: Any, expected: dict[str, int]) -> dict[str, int]:
    """The counters of the same names."""
    return {name: told[name] for name in expected}


def broken(first: int, count: int) -> Iterator[bytes]:
    """RTP of which, in every hundred, 3 are lost, one comes twice and one comes 5 late."""
    for i in range(count):
        place = i % 100
        if place in (20, 21, 60, 40):
            continue
        yield rtp(first + i)
        if place == 30:
            yield rtp(first + i)
        if place == 45:
            yield rtp(first + i - 5)


@pytest.fixture
def capture(line: Line, tmp_path: Path) -> Iterator[Any]:
    """Capture datagrams that reach the relay: `capture(count)`, then `.wait()`."""
    file = tmp_path / "left.pcapng"
    started: list[subprocess.Popen[str]] = []

    def start(count: int) -> tuple[Path, "subprocess.Popen[str]"]:
        said = tmp_path / "dumpcap.err"
        command = ["dumpcap", "-q", "-i", "left", "-f", f"udp port {RTP}", "-c", str(count), "-w", str(file)]
        with said.open("w") as out:
            started.append(line.hosts[1].popen(command, stderr=out))
        wait_until(lambda: "File:" in said.read_text() or started[-1].poll() is not None, "dumpcap captures")
        return file, started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def analysed(file: Path) -> tuple[int, int, float]:
    """What tshark says of the one RTP stream of a capture: packets, lost, greatest jitter in ms."""
    command = ["tshark", "-r", str(file), "-q", "-d", f"udp.port=={RTP},rtp", "-z", "rtp,streams"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (row,) = re.findall(r"0x0*7 .*?(\d+) +(-?\d+) \(-?[\d.]+%\) +([\d. -]+)", told)
    return int(row[0]), int(row[1]), float(row[2].split()[5])


def test_rtp_faults_are_counted_exactly_and_as_tshark_does(line: Line, relay: Relay, capture: Any) -> None:
    with Sender(line.hosts[0], RTP) as sender:
        datagrams = [*(rtp(65_500 + i) for i in range(10)), *broken(65_510, 500)]
        file, process = capture(len(datagrams))
        sender.send(*datagrams, pace_s=0.0005)
        stream = stream_of(relay, "rtp", sender)
        process.wait(60)
        assert stream["payload"] == "rtp"
        assert faults_of(stream["rtp"], NO_RTP_FAULT) == NO_RTP_FAULT | {"lost": 15, "duplicates": 5, "reordered": 5}
        packets, lost, jitter_max_ms = analysed(file)
        assert packets == sender.sent
        assert lost == stream["rtp"]["lost"] - stream["rtp"]["duplicates"]  # RFC 3550 A.3 sets them against each other
        assert stream["rtp"]["jitter_max_us"] / 1000 == pytest.approx(jitter_max_ms, rel=0.01, abs=0.002)

        sender.send(*(rtp(10 + i, ssrc=8) for i in range(20)))
        sender.send(*(rtp(40_000 + i, ssrc=8) for i in range(20)))
        told = stream_of(relay, "rtp", sender)["rtp"]
        assert (told["ssrc_changes"], told["sequence_restarts"], told["lost"]) == (1, 1, 15)

        worker = relay.ask("list-workers")[0]["pid"]
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: relay.ask("list-workers")[0]["pid"] not in (0, worker), "another worker")
        sender.send(*(rtp(40_020 + i, ssrc=8) for i in range(1, 20)))  # one is lost
        told = stream_of(relay, "rtp", sender)["rtp"]
        assert (told["ssrc_changes"], told["sequence_restarts"], told["lost"]) == (1, 1, 16)
        latency = relay.stats()["workers"][0]["latency"]
        assert latency["datagrams"] == sender.sent
        assert (
            0 < latency["p50_us"] <= latency["p90_us"] <= latency["p99_us"] <= latency["p99_9_us"] <= latency["max_us"]
        )
        assert relay.ask("streams", "ts") == {"ts": []}
        assert "no rule nothing" in relay.control("streams", "nothing").stderr
        assert "99.99 µs" in relay.control("get-stats").stdout
        assert re.search(
            r"rtp +10\.1\.0\.1:\d+ +left +rtp .*lost 16, reordered 5, dup", relay.control("streams").stdout
        )
    relay.stop()


def transport_stream(first: int, count: int) -> list[list[bytes]]:
    """Datagrams of seven cells: PAT, PMT, four of video of which the first has a PCR, and a null packet."""
    return [
        [
            cell(0, i),
            cell(4096, i),
            cell(256, 4 * i, pcr=i * PCR_TICKS),
            *(cell(256, 4 * i + k) for k in (1, 2, 3)),
            cell(0x1FFF, 5),
        ]
        for i in range(first, first + count)
    ]


def test_transport_stream_faults_are_counted_exactly(line: Line, relay: Relay) -> None:
    with Sender(line.hosts[0], TS) as plain, Sender(line.hosts[0], RTP) as wrapped:
        sound = [b"".join(cells) for cells in transport_stream(0, 200)]
        plain.send(*sound)
        wrapped.send(*(rtp(i, content=datagram) for i, datagram in enumerate(sound)))
        for rule_id, sender, payload in (("ts", plain, "mpeg-ts"), ("rtp", wrapped, "rtp mpeg-ts")):
            stream = stream_of(relay, rule_id, sender)
            assert stream["payload"] == payload
            told = stream["mpeg_ts"]
            assert faults_of(told, NO_TS_FAULT) == NO_TS_FAULT
            assert (told["pids"], told["continuity_errors_by_pid"]) == (3, {})
            assert told["bits_per_second"] == 7 * 188 * 8 * 50
        assert stream["rtp"]["lost"] == 0

        faulty = transport_stream(200, 100)
        del faulty[10][4]  # one of video
        del faulty[20][1]  # one of the PMT
        faulty[30][3] = cell(256, 4 * 230 + 1, error=True)
        faulty[40][6] = cell(0x1FFF, 5, sync=0x48)
        for k in (2, 3, 4):  # the PCR among them, and the sync is lost until five have come
            faulty[50][k] = bytes(188)
        faulty[60][2] = cell(256, 4 * 260, pcr=7, discontinuity=True)
        for i in range(61, 100):
            faulty[i][2] = cell(256, 4 * (200 + i), pcr=7 + (i - 60) * PCR_TICKS)
        faulty[80].append(b"not a whole one")
        plain.send(*(b"".join(cells) for cells in faulty))
        stream = stream_of(relay, "ts", plain)
        told = stream["mpeg_ts"]
        # Of cells that are not evaluated: video after 50/2 to 50/5 and PAT, PMT of 51 are gone, so is 51/2, the PCR.
        assert faults_of(told, NO_TS_FAULT) == NO_TS_FAULT | {
            "continuity_errors": 6,
            "transport_errors": 1,
            "sync_byte_errors": 4,
            "sync_losses": 1,
        }
        assert told["continuity_errors_by_pid"] == {"256": 3, "4096": 2, "0": 1}
        assert stream["malformed"] == 1
        assert told["packets"] == (300 - 2) * 7 - 2  # by the first two datagrams it was recognised
    relay.stop()


def lines_about(relay: Relay, text: str) -> list[str]:
    return [line for line in relay.text().splitlines() if text in line]


def test_a_stall_is_told_once_and_so_is_its_end(line: Line, relay: Relay) -> None:
    assert "from 10 to" in relay.control(*add_plain(5)).stderr
    assert relay.control(*add_plain(300)).returncode == 0
    with Sender(line.hosts[0], PLAIN) as steady, Sender(line.hosts[0], PLAIN) as halting:

        def while_steady(condition: Any, what: str) -> None:
            def turn() -> Any:
                steady.send(b"steady")
                return condition()

            wait_until(turn, what)

        halting.send(b"first")
        stalled = f"Stream of rule plain from {halting.name} stalled: nothing for"
        back = f"Stream of rule plain from {halting.name} is back after"
        for times in (1, 2):
            while_steady(lambda: len(lines_about(relay, stalled)) >= times, "stalled")  # noqa: B023
            assert len(lines_about(relay, back)) == times - 1
            halting.send(b"again")
            while_steady(lambda: len(lines_about(relay, back)) >= times, "back")  # noqa: B023
        while_steady(lambda: len(lines_about(relay, stalled)) >= 3, "stalled")
        assert [len(lines_about(relay, text)) for text in (stalled, back)] == [3, 2]
        assert all("[Warning]" in line for line in lines_about(relay, stalled))
        assert all("[Notice]" in line for line in lines_about(relay, back))
        assert all(int(line.split()[-2]) > 300 for line in lines_about(relay, stalled) + lines_about(relay, back))
    relay.stop()


def add_plain(stall_ms: int) -> Sequence[str]:
    """The rule of plain datagrams again, with a limit of silence."""
    output = f"239.2.2.2:{PLAIN}:right"
    names = ("--rule-id", "plain", "--input-group", "239.1.1.1", "--input-port", str(PLAIN), "--output", output)
    return ("add-rule", *names, "--replace", "--stall-ms", str(stall_ms))
