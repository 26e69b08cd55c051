"""A real stream: ffmpeg sends MPEG-TS over multicast, and what is recorded behind the relay is what it sent.

gen ──left── relay ──right── sink
"""

import subprocess
from pathlib import Path

from tests.system.conftest import StartRelay
from tests.system.harness import receiving
from tools.netns import Line

VIDEO_SECONDS = 8
TS_PACKET_BYTES = 188


def test_a_relayed_transport_stream_is_byte_for_byte_the_one_sent(
    line: Line, start_relay: StartRelay, tmp_path: Path
) -> None:
    gen, host, sink = line.hosts
    relay = start_relay(host)
    relay.add("tv", "239.1.1.1:5001", "239.2.2.2:6001:right")
    sent, recorded = tmp_path / "sent.ts", tmp_path / "recorded.ts"
    # One encoder, two muxed copies of the same packets: a file and the network.
    url = "udp://239.1.1.1:5001?pkt_size=1316&localaddr=10.1.0.1&ttl=1&bitrate=8000000"
    source = ["-f", "lavfi", "-i", f"testsrc2=size=640x360:rate=25:duration={VIDEO_SECONDS}"]
    with receiving(sink, tmp_path, "--interface", "left", "--record", str(recorded)) as summary:
        encode = ["ffmpeg", "-v", "error", "-re", *source, "-c:v", "mpeg2video", "-b:v", "4M", "-f", "mpegts"]
        file_of_sent = [*encode[:-2], "-f", "mpegts", "-flush_packets", "1", "pipe:1"]
        encoder = gen.popen(file_of_sent, stdout=subprocess.PIPE)
        copy = gen.popen(["tee", str(sent)], stdin=encoder.stdout, stdout=subprocess.PIPE)
        network = ["ffmpeg", "-v", "error", "-f", "data", "-i", "pipe:0", "-map", "0", "-c", "copy", "-f", "data", url]
        sender = gen.popen(network, stdin=copy.stdout)
        assert [process.wait(60) for process in (encoder, copy, sender)] == [0, 0, 0]
        result = summary()
    assert result["datagrams"] > VIDEO_SECONDS * 10
    assert recorded.read_bytes() == sent.read_bytes()
    assert sent.stat().st_size % TS_PACKET_BYTES == 0
    assert relay.assert_accounted()["packets_relayed"] == result["datagrams"]
