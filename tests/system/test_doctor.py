"""`mcrctl doctor` on a host whose settings are really wrong: it finds each, and a remedy that mends it.

gen ──left── relay ══right, spare══ sink        10.1.0.0/24, 10.2.0.0/24, 10.3.0.0/24
"""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from relay import api
from relay.cli.checks.ethtool import offloads
from relay.cli.mcrctl import main
from tests.system.harness import BIN, PYTHON, Relay, wait_until
from tests.system.test_explain import ask, states
from tests.system.test_rules import sender
from tools.netns import Host, Line, connect

OUT = "239.2.2.2:6001:right"
QUERIES = """
import sys
from scapy.contrib.igmp import IGMP
from scapy.layers.inet import IP
from scapy.layers.l2 import Ether
from scapy.sendrecv import sendp
query = Ether(dst="01:00:5e:00:00:01") / IP(src="10.1.0.1", dst="224.0.0.1", ttl=1) / IGMP(type=0x11, mrcode=1)
print("ready", flush=True)
sendp(query, iface="right", inter=0.1, loop=1, verbose=False)
"""


STRANGER = """
import os, sys
from relay.cli.checks import cores, host, network, probes, relay  # while the files of this environment may be read
from relay.cli.explaining import explanation
from relay.cli.mcrctl import main
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def line() -> Iterator[Line]:
    """gen ─ relay ═ sink, for all tests of this file."""
    with Line("gen", "relay", "sink") as line:
        connect(line.hosts[1], "spare", "10.3.0.1/24", line.hosts[2], "spare", "10.3.0.2/24")
        yield line


@pytest.fixture(scope="module")
def relay(line: Line, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    """A start takes longer than what is asked here."""
    relay = Relay(line.hosts[1], tmp_path_factory.mktemp("relay"), ("left",))
    yield relay
    relay.kill()


def doctor(relay: Relay, *options: str) -> list[Any]:
    """The findings; the exit status must say the same."""
    result = relay.control("doctor", "--seconds", "0.1", *options, "--json")
    assert result.returncode in (0, 1), result.stderr
    findings: list[Any] = json.loads(result.stdout)
    assert result.returncode == int(any(finding["severity"] == "problem" for finding in findings))
    return findings


def of(findings: list[Any], check: str, text: str = "") -> Any:
    """The one finding of a check whose text has these words."""
    (found,) = [each for each in findings if each["check"] == check and text in each["finding"]]
    return found


def shell(host: Host, command: str) -> None:
    assert host.run(["sh", "-c", command], capture_output=True).returncode == 0, command


def test_wrong_settings_are_found_and_their_remedies_mend_them(line: Line, relay: Relay, tmp_path: Path) -> None:
    gen, host, _ = line.hosts
    relay.add_many(tmp_path, [(f"r{number}", f"239.1.1.{number}:5001", OUT) for number in range(1, 13)])
    relay.add("decrement", "239.1.1.99:5001", "239.2.2.3:6001:right:decrement")
    relay.add("waits", "239.1.1.98:5001", "239.2.2.4:6001:spare")
    settings = ("net.ipv4.conf.left.rp_filter=1", "net.ipv4.igmp_max_memberships=5", "net.ipv4.conf.all.rp_filter=0")
    shell(host, f"sysctl -qw {' '.join(settings)} net.ipv4.conf.left.force_igmp_version=2")
    shell(host, "ip link set right mtu 1000; ip link set spare down; ip link add br0 type bridge mcast_snooping 1")
    with sender(gen, 1) as out:
        out.sendto(b"payload", ("239.1.1.99", 5001))
    wait_until(lambda: ask(relay, api.GetStats())["drops"]["ttl"] == 1, "the datagram is dropped")
    wait_until(lambda: sum(state != "active" for state in states(relay)) == 1, "one rule waits")

    findings = doctor(relay)
    expected = (
        ("rp-filter", "left is strict", "note"),
        ("memberships", "14 joins take 3 sockets, as igmp_max_memberships is 5", "warning"),
        ("igmp-version", "IGMPv2 is forced on left", "note"),
        ("mtu", "payloads over 972 bytes leave as fragments (rules r1, r2, r3, r4, r5 and 8 more)", "warning"),
        ("interface", "spare is down", "problem"),
        ("rules", "rule waits waiting: interface spare is down", "problem"),
        ("bridge", "br0 snoops and is no querier", "note"),
        ("drops", "ttl 1: they came with TTL 1", "warning"),
        ("joined", "14 groups joined", "ok"),
        ("log", "no log record was lost in 6 rings", "ok"),
        ("workers", "runs", "ok"),
    )
    for check, text, severity in expected:
        assert of(findings, check, text)["severity"] == severity

    remedied = ("rp-filter", "memberships", "igmp-version", "mtu", "interface", "bridge")
    for check in remedied:
        remedy = of(findings, check, next(text for name, text, _ in expected if name == check))["remedy"]
        shell(host, str(remedy).partition(",")[0])
    wait_until(lambda: set(states(relay)) == {"active"}, "no rule waits")
    mended = doctor(relay)
    for check in (*remedied, "rules"):
        assert {found["severity"] for found in mended if found["check"] == check} == {"ok"}, check


def test_a_querier_is_heard_and_the_relays_network_is_looked_at_from_outside(line: Line, relay: Relay) -> None:
    """The first query sets the kernel's timer of the version that it has, so the file tells of it, too."""
    gen, host, _ = line.hosts
    before = of(doctor(relay), "querier")
    assert before["severity"] == "note"
    assert "--seconds 130" in before["remedy"]
    queries = gen.popen([PYTHON, "-c", QUERIES], stdout=subprocess.PIPE)
    try:
        assert queries.stdout is not None
        assert queries.stdout.readline() == "ready\n"
        command = [str(BIN / "mcrctl"), "--socket", str(relay.socket), "doctor", "--seconds"]
        told = wait_until(lambda: _hears(command), "the query is heard")
    finally:
        queries.kill()
        queries.wait()
    assert told["severity"] == "ok"
    igmp = str(host.run(["cat", "/proc/net/igmp"], capture_output=True).stdout)
    assert "V2" in igmp


def _hears(command: list[str]) -> Any:
    """Outside of the relay's namespace; long enough that a query, ten a second, comes meanwhile."""
    result = subprocess.run([*command, "1", "--json"], capture_output=True, text=True, check=False)
    found = of(json.loads(result.stdout), "querier")
    assert of(json.loads(result.stdout), "interface", "interface left is up")["severity"] == "ok"
    return found if found["finding"] == "10.1.0.1 queries on left" else None


def test_offloads_are_those_that_ethtool_shows(line: Line) -> None:
    host = line.hosts[1]
    for state in ("on", "off"):
        shell(host, f"ethtool -K spare gro {state} rx-udp-gro-forwarding {state}")
        with host.inside():
            features = offloads("spare")
        shown = str(host.run(["ethtool", "-k", "spare"], capture_output=True).stdout)
        assert features["rx-gro"] is (state == "on")
        assert features["rx-udp-gro-forwarding"] is (state == "on")
        for name in ("rx-udp-gro-forwarding", "rx-gro-list", "tx-udp-segmentation", "tx-checksum-ip-generic"):
            assert f"{name}: {'on' if features[name] else 'off'}" in shown
    assert offloads("no-such") == {}


def test_who_is_not_root_sees_what_everybody_may(line: Line, relay: Relay) -> None:
    host = line.hosts[1]
    command = [PYTHON, "-c", STRANGER, "--socket", relay.socket.name]
    relay.socket.parent.chmod(0o711)  # the folders above are root's alone
    result = host.run([*command, "doctor", "--seconds", "0.1", "--json"], capture_output=True, cwd=relay.socket.parent)
    findings = json.loads(result.stdout)
    assert of(findings, "relay", "may not be looked at: some checks are left out")["remedy"] == "sudo mcrctl doctor"
    assert of(findings, "interface", "left is up")["severity"] == "ok"
    assert not [finding for finding in findings if finding["check"] == "log"]
    question = ("explain", "10.1.0.1", "239.1.1.1:5001", "--json")
    result = host.run([*command, *question], capture_output=True, cwd=relay.socket.parent)
    assert json.loads(result.stdout)["steps"], result.stderr


def test_without_a_relay_the_host_is_checked(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        main, ["--socket", str(tmp_path / "none"), "doctor", "--seconds", "0.1", "--interface", "lo"]
    )
    assert f"no relay answers on {tmp_path}/none: No such file or directory: host checks only" in result.stdout
    assert "interface lo is up" in result.stdout
    assert "problem  " not in result.stdout or result.exit_code == 1
    assert result.exit_code in (0, 1)
