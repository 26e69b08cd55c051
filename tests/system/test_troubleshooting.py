"""docs/troubleshooting.md is run: each section's fault is made, its commands print what the page says, and its remedies
mend it.

gen ──eth0── relay ──eth1── sink        10.1.0.0/24, 10.2.0.0/24
"""

import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether
from scapy.packet import Raw

from relay import api
from relay.rules import Output, Rule
from tests.system.harness import BIN, Relay, wait_until
from tests.system.test_explain import ask, remove_all
from tools.environment import CHECKOUT
from tools.netns import Host, connect

PAGE = (CHECKOUT / "docs" / "troubleshooting.md").read_text()
GROUP, PORT = "239.1.1.1", 5001
OUT = Output("239.2.2.2", 6001, "eth1")
LEFT_OUT = "…"
UNICAST = "02:00:00:00:00:01"


def sections() -> dict[str, list[tuple[str, list[str]]]]:
    """The commands of each section, in order, with the lines that they print."""
    found: dict[str, list[tuple[str, list[str]]]] = {}
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE):
        title = section.partition("\n")[0].lstrip("# ")
        commands: list[tuple[str, list[str]]] = []
        for block in re.findall(r"^```console\n(.*?)^```", section, re.MULTILINE | re.DOTALL):
            for line in block.splitlines():
                if line.startswith("# "):
                    commands.append((line[2:], []))
                else:
                    commands[-1][1].append(line)
        if commands:
            found[title] = commands
    return found


SECTIONS = sections()


@dataclass
class World:
    """The hosts, the relay, and a folder whose mcrctl asks this relay."""

    gen: Host
    host: Host
    folder: Path
    relay: Relay

    def shell(self, command: str, outside: bool = False) -> str:
        """Run a command as the page has it, on the relay's host or outside of its network namespace."""
        path = f"{self.folder}:{BIN}:{os.environ['PATH']}"
        words = ["sh", "-c", command]
        run = subprocess.run(
            words if outside else self.host.command(words),
            env={**os.environ, "PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return run.stdout

    def send(self, frames: int, ttl: int = 1, checksum: int | None = None) -> None:
        """Send frames as they come from a wire: no socket of the sender's sets the checksum right."""
        mac = "01:00:5e:01:01:01"
        with self.gen.inside(), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as out:
            out.bind(("eth0", 0))
            datagram = UDP(sport=40_000, dport=PORT, chksum=checksum) / Raw(b"payload")
            frame = bytes(Ether(src=UNICAST, dst=mac) / IP(src="10.1.0.1", dst=GROUP, ttl=ttl) / datagram)
            for _ in range(frames):
                out.send(frame)

    def add_tv(self, output: Output = OUT, interface: str | None = None) -> None:
        """The rule of the page, its counters and memberships from nothing."""
        remove_all(self.relay)
        rule = Rule(rule_id="tv", input_group=GROUP, input_port=PORT, outputs=(output,), input_interface=interface)
        ask(self.relay, api.AddRules((rule,)))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("page")
    with Host("gen") as gen, Host("relay") as host, Host("sink") as sink:
        connect(gen, "eth0", "10.1.0.1/24", host, "eth0", "10.1.0.2/24")
        connect(host, "eth1", "10.2.0.1/24", sink, "eth0", "10.2.0.2/24")
        relay = Relay(host, folder, ("eth0",), 1, "--exclusive")  # for one section, the others don't mind
        try:
            script = folder / "mcrctl"
            script.write_text(f'#!/bin/sh\nexec {BIN}/mcrctl --socket {relay.socket} "$@"\n')
            script.chmod(0o755)
            yield World(gen, host, folder, relay)
        finally:
            relay.kill()


def reverse_path(world: World) -> None:
    world.shell("sysctl -qw net.ipv4.conf.eth0.rp_filter=1")


def bridged(world: World) -> None:
    world.shell("ip link add br0 type bridge mcast_snooping 1; ip link set br0 up")


def ttl(world: World) -> None:
    world.add_tv(Output("239.2.2.2", 6001, "eth1", "decrement"))
    world.send(3)
    wait_until(lambda: ask(world.relay, api.GetStats())["drops"]["ttl"], "the datagrams are dropped")


def small_mtu(world: World) -> None:
    world.shell("ip link set eth1 mtu 1000")


def no_memberships(world: World) -> None:
    remove_all(world.relay)  # or its socket has room
    world.shell("sysctl -qw net.ipv4.igmp_max_memberships=0")
    world.add_tv()


def without_ipv6(world: World) -> None:
    world.shell("sysctl -qw net.ipv6.conf.eth1.disable_ipv6=1")
    world.relay.wait_for_log("Interface eth1 has no IPv6 address")


def wrong_checksum(world: World) -> None:
    world.send(5, checksum=0x1234)
    wait_until(lambda: ask(world.relay, api.GetStats())["drops"]["checksum"] == 5, "the frames are dropped")


def wrong_interface(world: World) -> None:
    world.add_tv(interface="eth1")


FAULTS: dict[str, Callable[[World], None]] = {
    "Reverse path": reverse_path,
    "Snooping without a querier": bridged,
    "TTL 1": ttl,
    "MTU": small_mtu,
    "Limits of IGMP": no_memberships,
    "IPv6": without_ipv6,
    "Checksum offload": wrong_checksum,
    "Wrong interface": wrong_interface,
}
OUTSIDE = "Containers"


def assert_prints(shown: list[str], printed: str, command: str) -> None:
    """Every line that the page shows is printed, in this order; other lines only where the page leaves some out."""
    lines = [line.rstrip() for line in printed.splitlines()]
    at, gap = 0, False
    for line in shown:
        if line == LEFT_OUT:
            gap = True
            continue
        where = lines.index(line, at) if line in lines[at:] else -1
        assert where >= 0, f"`{command}` does not print {line!r} but:\n{printed}"
        assert gap or where == at, f"`{command}` prints before {line!r}:\n{printed}"
        at, gap = where + 1, False
    assert gap or at == len(lines), f"`{command}` prints more:\n{printed}"


@pytest.mark.parametrize("title", SECTIONS)
def test_the_commands_of_a_section_print_what_it_says(world: World, title: str) -> None:
    world.add_tv()
    if title in FAULTS:
        FAULTS[title](world)
    for command, shown in SECTIONS[title]:
        printed = world.shell(command, outside=title == OUTSIDE)
        # The relay of the page has no name of its own.
        assert_prints(shown, printed.replace(f"mcr_{world.relay.instance}", "mcr"), command)


def test_every_fault_has_its_section() -> None:
    assert {*FAULTS, OUTSIDE} < set(SECTIONS)
