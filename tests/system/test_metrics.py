"""Metrics of a live relay: a real Prometheus scrapes them; a worker that is replaced, a relay that goes and comes back.

gen ──left── relay ──right── sink      mcrctl metrics and prometheus on the relay's loopback
"""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.system.harness import BIN, Relay, wait_until
from tests.system.test_stream_health import Sender, broken, rtp
from tools.netns import Host, Line

COUNT = 3000
PAYLOAD_BYTES = 1316
BURST = 50
FAULTS = ("lost", "reordered", "duplicate")
RTP_PORT = 5002
PROMETHEUS_PORT = 9090
CONFIG = """
global: {scrape_interval: 250ms}
scrape_configs: [{job_name: mcr, static_configs: [{targets: ["%s"]}]}]
"""


class Exporter:
    """A running `mcrctl metrics`."""

    def __init__(self, host: Host, folder: Path, control_socket: Path) -> None:
        self.host = host
        self.log = folder / "metrics.log"
        command = [str(BIN / "mcrctl"), "--socket", str(control_socket), "metrics", "--listen", "127.0.0.1:0"]
        with self.log.open("w") as out:
            self.process = host.popen(command, stderr=out)
        self.target = wait_until(self._target, "it serves")

    def _target(self) -> str | None:
        found = re.search(r"http://(\S+)/metrics", self.log.read_text())
        return found[1] if found else None

    def text(self) -> str:
        return get(self.host, self.target, "/metrics")

    def samples(self) -> dict[str, float]:
        """Every sample by name and labels, as `name{a=b}`."""
        found = {}
        for metric in text_string_to_metric_families(self.text()):
            for sample in metric.samples:
                labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
                found[f"{sample.name}{{{labels}}}"] = sample.value
        return found


def get(host: Host, target: str, path: str) -> str:
    """GET from a server in a namespace."""
    connection = http.client.HTTPConnection(target, timeout=30)
    with host.inside():
        connection.connect()
    with contextlib.closing(connection):
        connection.request("GET", path)
        return connection.getresponse().read().decode()


@pytest.fixture(scope="module")
def hosts() -> Iterator[Line]:
    with Line("gen", "relay", "sink") as line:
        yield line


@pytest.fixture(scope="module")
def relay(hosts: Line, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    """Three rules; COUNT datagrams have come for the first one, which has two outputs."""
    relay = Relay(hosts.hosts[1], tmp_path_factory.mktemp("metrics"), ("left",))
    try:
        relay.add("tv", "239.1.1.1:5001", "239.2.2.2:6001:right", "239.2.2.3:6001:right")
        relay.add("radio", "239.1.1.9:5001", "239.2.2.9:6001:right")
        relay.add("rtp", f"239.1.1.1:{RTP_PORT}", "239.2.2.2:6002:right")
        traffic(hosts)
        wait_until(lambda: relay.stats()["packets_matched"] == COUNT, "all have come")
        yield relay
    finally:
        relay.kill()


@pytest.fixture(scope="module")
def exporter(relay: Relay, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exporter]:
    exporter = Exporter(relay.host, tmp_path_factory.mktemp("exporter"), relay.socket)
    yield exporter
    exporter.process.send_signal(signal.SIGTERM)
    assert exporter.process.wait(10) == 0


def traffic(hosts: Line) -> None:
    """COUNT datagrams for the first rule, in bursts that the cable's queue has room for (netdev_max_backlog)."""
    with hosts.hosts[0].inside(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("10.1.0.1"))
        for sent in range(COUNT):
            sock.sendto(bytes(PAYLOAD_BYTES), ("239.1.1.1", 5001))
            if sent % BURST == 0:
                time.sleep(0.002)


@pytest.fixture(scope="module")
def prometheus(exporter: Exporter, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prometheus that scrapes the exporter, from five seconds after its start on; its address."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = folder / "prometheus.yml"
    config.write_text(CONFIG % exporter.target)
    address = f"127.0.0.1:{PROMETHEUS_PORT}"
    options = [f"--config.file={config}", f"--storage.tsdb.path={folder}/tsdb", f"--web.listen-address={address}"]
    with (folder / "prometheus.log").open("w") as out:
        process = exporter.host.popen(["prometheus", *options], stdout=out, stderr=out)
    yield address
    process.kill()  # what it has stored goes with the test
    process.wait()
    print((folder / "prometheus.log").read_text())


@pytest.mark.usefixtures("prometheus")
def test_metrics_are_what_was_relayed(exporter: Exporter) -> None:
    samples = exporter.samples()
    assert samples["mcr_up{}"] == 1
    assert samples["mcr_rule_packets_total{rule=tv}"] == COUNT
    assert samples["mcr_rule_bytes_total{rule=tv}"] == COUNT * PAYLOAD_BYTES
    assert samples["mcr_output_packets_total{output=239.2.2.3:6001:right,rule=tv}"] == COUNT
    assert samples["mcr_rule_packets_total{rule=radio}"] == 0
    assert abs(samples["mcr_rule_last_packet_timestamp_seconds{rule=tv}"] - time.time()) < 300
    assert "mcr_rule_last_packet_timestamp_seconds{rule=radio}" not in samples
    assert {value for name, value in samples.items() if name.startswith("mcr_output_drops")} == {0}


def test_promtool_finds_nothing_to_blame(exporter: Exporter) -> None:
    """Names, units and help by Prometheus' conventions."""
    result = subprocess.run(
        ["promtool", "check", "metrics"], input=exporter.text(), capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_no_counter_goes_back_when_a_worker_is_replaced(hosts: Line, relay: Relay, exporter: Exporter) -> None:
    with Sender(hosts.hosts[0], RTP_PORT) as sender:
        sender.send(*(rtp(i) for i in range(10)), *broken(10, 500), pace_s=0.0005)
        arrived = "mcr_rule_packets_total{rule=rtp}"
        wait_until(lambda: exporter.samples()[arrived] == sender.sent, "all have come")
        replace_worker(hosts, relay, exporter, sender)


def replace_worker(hosts: Line, relay: Relay, exporter: Exporter, sender: Sender) -> None:
    """Kill the worker, and have its successor count on; `sender` has sent 15 datagrams too few, 5 late and 5 twice."""
    before = exporter.samples()
    faults = {name: before[f"mcr_rule_rtp_{name}_packets_total{{rule=rtp}}"] for name in FAULTS}
    assert faults == {"lost": 15, "reordered": 5, "duplicate": 5}
    assert (before["mcr_rule_streams{rule=rtp}"], before["mcr_rule_streams{rule=radio}"]) == (1, 0)
    assert 0 < before["mcr_rule_rtp_jitter_seconds{rule=rtp}"] < 10
    assert "mcr_rule_rtp_lost_packets_total{rule=tv}" not in before
    (worker,) = relay.ask("list-workers")
    core = worker["core"]
    os.kill(worker["pid"], signal.SIGKILL)
    restarts = f"mcr_worker_restarts_total{{core={core}}}"

    def counters() -> dict[str, float]:
        samples = exporter.samples()
        endings = ("_total", "_bucket", "_count", "_sum")
        counted = {name: value for name, value in samples.items() if name.partition("{")[0].endswith(endings)}
        lower = {name: value for name, value in counted.items() if value < before.get(name, 0)}
        assert lower == {}
        return samples

    wait_until(lambda: counters()[restarts] == before[restarts] + 1, "the end is counted")
    wait_until(lambda: counters()[f"mcr_worker_running{{core={core}}}"] == 1, "another one runs")
    traffic(hosts)
    wait_until(lambda: counters()["mcr_rule_packets_total{rule=tv}"] == 2 * COUNT, "counters go on")
    sender.send(*(rtp(510 + i) for i in range(1, 20)))  # one is lost
    wait_until(lambda: counters()["mcr_rule_rtp_lost_packets_total{rule=rtp}"] == 16, "so do those of streams")
    relayed = f"mcr_worker_relay_latency_seconds_count{{core={core}}}"
    wait_until(lambda: counters()[relayed] == 2 * COUNT + sender.sent, "each datagram has a latency")


def query(host: Host, address: str, expression: str) -> Any:
    """The value of an instant query that has one; None while there is no result."""
    with contextlib.suppress(ConnectionRefusedError, json.JSONDecodeError):  # it starts
        answer = get(host, address, "/api/v1/query?query=" + urllib.parse.quote(expression))
        result = json.loads(answer).get("data", {}).get("result", [])
        return float(result[0]["value"][1]) if result else None
    return None


def test_a_real_prometheus_answers_with_the_figure(exporter: Exporter, prometheus: str) -> None:
    def ask(expression: str) -> Any:
        return query(exporter.host, prometheus, expression)

    wait_until(
        lambda: ask("sum(mcr_rule_packets_total{rule='tv'})") == 2 * COUNT, "it has scraped what has come by now"
    )
    assert ask('up{job="mcr"}') == 1
    assert ask("sum by (rule) (mcr_output_bytes_total{rule='tv'})") == 2 * 2 * COUNT * PAYLOAD_BYTES
    assert ask("mcr_worker_drops_total{cause='ring_full'}") == 0
    assert ask("mcr_build_info") == 1
    assert 0 < ask("histogram_quantile(0.5, sum by (le) (mcr_worker_relay_latency_seconds_bucket))") < 1.1


def test_metrics_outlive_the_relay(relay: Relay, exporter: Exporter) -> None:
    relay.stop()
    samples = exporter.samples()
    assert samples == {"mcr_up{}": 0}
    relay.start_again()
    running = f"mcr_worker_running{{core={relay.cores(1)[0]}}}"
    wait_until(lambda: exporter.samples().get(running) == 1, "it is seen")
    assert exporter.process.poll() is None
    lines = exporter.log.read_text().splitlines()[1:]
    assert ["no relay answers" in line or "answers again" in line for line in lines] == [True, True]
