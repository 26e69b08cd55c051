"""Each check of doctor on files as the kernel writes them, below a folder of the test: what is wrong is found, what is
well is said to be well, and nothing is invented.
"""

import socket
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from relay.cli import host
from relay.cli.checks import cores, ipv6, network, relay  # noqa: F401 - they register themselves
from relay.cli.checks import host as host_checks  # noqa: F401
from relay.cli.checks.causes import MEANINGS, meaning_of
from relay.cli.checks.registry import REGISTRY, Found, run
from relay.cli.checks.situation import Probes, Situation, count
from relay.cli.host import Files
from relay.cli.running import Running
from relay.dataplane.layout import DropCause
from relay.rules import Output, Rule, Secondary
from relay.supervisor.interfaces import Interface
from relay.supervisor.plan import make_plan

LIMITS = """Limit                     Soft Limit           Hard Limit           Units
Max locked memory         {memory}              8388608              bytes
Max open files            {files}                20000                files
"""
IGMP = """Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter
1\tlo        :     1      V3
\t\t\t\t010000E0     1 0:00000000\t\t0
2\tleft      :     2      {querier}
\t\t\t\t{group}     1 0:00000000\t\t0
\t\t\t\t010000E0     1 0:00000000\t\t0
"""
SOFTNET = "0000208e {dropped} 0000000b 0 0 0 0 0 0 0 0 0 00000001 00000000 00000000\n"
INTERFACES = {
    "left": Interface("left", 2, True, True, 1500, ("10.1.0.2",)),
    "right": Interface("right", 3, True, True, 1500, ("10.2.0.1",)),
}
WORKER = {"core": 1, "pid": 7, "state": "running", "uptime_s": 99.0, "ring_fill_max_percent": 0, "is_excluded": False}
NO_DROPS = {cause.name.lower(): 0 for cause in DropCause if cause is not DropCause.NONE}


def rule(number: int = 1, source: str | None = None) -> Rule:
    outputs = (Output("239.2.2.2", 6001, "right"),)
    group = f"239.1.1.{number}"
    return Rule(rule_id=f"r{number}", input_group=group, input_port=5001, source=source, outputs=outputs)


def rule6(source: str | None = None) -> Rule:
    outputs = (Output("ff3e::2", 6001, "right"),)
    return Rule(rule_id=f"six-{source}", input_group="ff3e::1", input_port=5001, source=source, outputs=outputs)


def running(
    rules: tuple[Rule, ...] = (rule(),),
    state: str = "active",
    drops: dict[str, int] | None = None,
    is_private: bool = True,
    **worker: Any,
) -> Running:
    stats = {"drops": {**NO_DROPS, **(drops or {})}, "workers": [{**WORKER, **worker}], "uptime_s": 100.0, "rules": []}
    return Running(7, None, is_private, "0.1.0", ("left",), rules, {r.rule_id: state for r in rules}, stats)


def protected(delivers: tuple[bool, bool] = (True, True), active: str | None = None) -> Running:
    there = running()
    legs = [{"input": name, "delivers": each} for name, each in zip("ab", delivers, strict=True)]
    there.stats["rules"] = [{"rule_id": "tv", "protection": {"legs": legs, "active": active}}, {"rule_id": "plain"}]
    return there


def situation(root: Path, files: dict[str, str], **facts: Any) -> Situation:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text + "\n")
    facts = {"ingress": ("left",), "interfaces": INTERFACES, "interval_s": 1.0, **facts}
    if (there := facts.get("relay")) is not None:
        facts.setdefault("plan", make_plan(there.rules, facts["interfaces"], there.interfaces))
    return Situation(files=Files(root), **facts)


LEGS = msgspec.structs.replace(rule(), secondary=Secondary(input_group="ff3e::1"), protection="seamless")
WITH_IPV6 = {
    "left": msgspec.structs.replace(INTERFACES["left"], addresses6=("fd00:1::2", "fe80::2")),
    "right": msgspec.structs.replace(INTERFACES["right"], addresses6=("fd00:2::1", "fe80::1")),
}
LINK_LOCAL = {**WITH_IPV6, "right": msgspec.structs.replace(INTERFACES["right"], addresses6=("fe80::1",))}
NARROW = {**WITH_IPV6, "right": msgspec.structs.replace(INTERFACES["right"], mtu_bytes=1000)}
SIX = {"relay": running((rule6(),)), "interfaces": WITH_IPV6}
PICKY = {"relay": running((rule6("fd00:1::7"), rule6("fd00:1::8"))), "interfaces": WITH_IPV6}
IGMP6 = "2    left            ff3e000000000000000000000000000{last}     1 00000004 0"
IPV6 = "proc/sys/net/ipv6"

NET, IPV4, CPU = "sys/class/net", "proc/sys/net/ipv4", "sys/devices/system/cpu"
CLOCK = "sys/devices/system/clocksource/clocksource0/current_clocksource"
UP, DOWN, NO_MULTICAST = "0x1003", "0x1002", "0x3"
LEFT_UP, RIGHT_UP = {f"{NET}/left/flags": UP}, {f"{NET}/right/flags": UP}
SMALL = {**INTERFACES, "right": Interface("right", 3, True, True, 1000, ("10.2.0.1",))}
MANY = tuple(rule(number) for number in range(1, 13))
OUTPUTS = rule().outputs
UNICAST = tuple(Rule(rule_id=a, input_group=a, input_port=5001, outputs=OUTPUTS) for a in ("10.1.0.2", "10.9.9.9"))
BOUND = f"head\n 1: {int.from_bytes(bytes((10, 9, 9, 9)), sys.byteorder):08X}:1389 00000000:0000 7 0 0 0 0 0 99"
IRQ = {f"{NET}/left/device/msi_irqs/30": "msi", "proc/interrupts": "  CPU0 CPU1\n 30: 5 0 PCI left-rx-0"}

# check: what is not well - files, facts, severity and text - and what is
Case = tuple[dict[str, str], dict[str, Any], str, str]
CASES: dict[str, list[Case]] = {
    "kernel": [
        ({"proc/sys/kernel/osrelease": "5.15.0"}, {}, "problem", "kernel 5.15.0 is too old"),
        ({}, {}, "problem", "kernel unknown is too old"),
        ({"proc/sys/kernel/osrelease": "6.1.0-13"}, {}, "ok", "Linux 6.1.0-13"),
    ],
    "io-uring": [
        ({"proc/sys/kernel/io_uring_disabled": "2"}, {}, "problem", "kernel.io_uring_disabled = 2"),
        (
            {},
            {"probes": Probes(io_uring_refusal="io_uring_setup: denied: do that")},
            "problem",
            "io_uring_setup: denied",
        ),
        ({"proc/sys/kernel/io_uring_disabled": "0"}, {}, "ok", "allowed"),
    ],
    "open-files": [
        ({"proc/self/limits": LIMITS.format(memory=1, files=1).replace("20000", "100")}, {}, "problem", "100"),
        (
            {"proc/7/limits": LIMITS.format(memory=1, files=1000)},
            {"relay": running(), "probes": Probes(descriptors_used=900)},
            "warning",
            "900 files open, 1000 are allowed",
        ),
        ({"proc/self/limits": LIMITS.format(memory=1, files=1)}, {}, "ok", "20000 are allowed"),
    ],
    "locked-memory": [
        ({"proc/self/limits": LIMITS.format(memory=65536, files=1)}, {}, "warning", "65536 bytes are allowed"),
        ({"proc/self/limits": LIMITS.format(memory="unlimited", files=1)}, {}, "ok", "unlimited"),
    ],
    "socket-buffers": [
        ({"proc/sys/net/core/rmem_max": "212992"}, {}, "note", "receivers on this host may lose bursts"),
        ({"proc/sys/net/core/wmem_max": "8388608"}, {}, "ok", "wmem_max is 8388608"),
    ],
    "shared-memory": [
        ({}, {"probes": Probes(shm_free_bytes=5 << 20)}, "warning", "/dev/shm has 5 MiB left"),
        ({}, {"probes": Probes(shm_free_bytes=5 << 30)}, "ok", "5120 MiB left"),
    ],
    "clock-source": [
        ({CLOCK: "acpi_pm"}, {}, "warning", "each reading is a system call"),
        ({CLOCK: "kvm-clock"}, {}, "ok", "kvm-clock"),
    ],
    "clock-synchronised": [
        ({}, {"probes": Probes(clock_is_synchronised=False)}, "note", "not synchronised"),
        ({}, {"probes": Probes(clock_is_synchronised=True)}, "ok", "synchronised"),
    ],
    "interface": [
        ({}, {}, "problem", "left does not exist"),
        ({f"{NET}/left/flags": DOWN}, {}, "problem", "left is down"),
        ({**LEFT_UP, f"{NET}/left/carrier": "0"}, {}, "problem", "left has no carrier"),
        ({f"{NET}/left/flags": NO_MULTICAST}, {}, "warning", "no MULTICAST flag"),
        ({**LEFT_UP, f"{NET}/right/flags": DOWN}, {"relay": running()}, "problem", "right is down"),
        (LEFT_UP, {}, "ok", "left is up"),
        ({f"{NET}/lo/flags": "0x9"}, {"ingress": ("lo",)}, "ok", "lo is up"),
    ],
    "rp-filter": [
        ({f"{IPV4}/conf/all/rp_filter": "1", f"{IPV4}/conf/left/rp_filter": "0"}, {}, "note", "left is strict"),
        (
            {f"{IPV4}/conf/all/rp_filter": "1", "proc/net/netstat": "TcpExt: A IPReversePathFilter\nTcpExt: 1 7"},
            {},
            "note",
            "(7 dropped so far",
        ),
        ({f"{IPV4}/conf/all/rp_filter": "1", f"{IPV4}/conf/left/rp_filter": "2"}, {}, "ok", "is 2"),
    ],
    "igmp-version": [
        ({f"{IPV4}/conf/all/force_igmp_version": "2"}, {}, "note", "IGMPv2 is forced on left"),
        (
            {f"{IPV4}/conf/left/force_igmp_version": "2"},
            {"relay": running((rule(source="10.1.0.9"),))},
            "warning",
            "though rules ask for sources",
        ),
        ({f"{IPV4}/conf/left/force_igmp_version": "0"}, {}, "ok", "no IGMP version is forced"),
    ],
    "memberships": [
        ({f"{IPV4}/igmp_max_memberships": "0"}, {}, "problem", "no group can be joined"),
        ({f"{IPV4}/igmp_max_memberships": "5"}, {"relay": running(MANY)}, "warning", "12 joins take 3 sockets"),
        ({f"{IPV4}/igmp_max_memberships": "20"}, {"relay": running(MANY)}, "ok", "12 groups wanted"),
    ],
    "joined": [
        (
            {"proc/net/igmp": IGMP.format(querier="V3", group="020101EF")},
            {"relay": running()},
            "problem",
            "not joined: 239.1.1.1 on left",
        ),
        (
            {"proc/net/igmp": IGMP.format(querier="V3", group="010101EF")},
            {"relay": running()},
            "ok",
            "1 group joined",
        ),
        ({"proc/net/igmp": "", "proc/net/igmp6": IGMP6.format(last=2)}, SIX, "problem", "not joined: ff3e::1 on left"),
        ({"proc/net/igmp": "", "proc/net/igmp6": IGMP6.format(last=1)}, SIX, "ok", "1 group joined"),
    ],
    "unicast-inputs": [
        ({}, {"relay": running(UNICAST)}, "warning", "no address of this host: 10.9.9.9"),
        ({}, {"relay": running(UNICAST[:1])}, "ok", "1 unicast input of this host's own"),
        ({"proc/net/udp": BOUND}, {"relay": running(UNICAST)}, "ok", "2 unicast inputs of this host's own"),
    ],
    "querier": [
        ({}, {"probes": Probes(queriers={})}, "note", "1 s are too short to tell"),
        ({}, {"probes": Probes(queriers={}), "interval_s": 130.0}, "warning", "no IGMP query came in on left in 130 s"),
        ({}, {"interval_s": 130.0}, "note", "not known"),
        ({"proc/net/igmp": IGMP.format(querier="V2", group="010101EF")}, {}, "ok", "IGMPv2 was heard"),
        ({}, {"probes": Probes(queriers={"left": "10.1.0.254"})}, "ok", "10.1.0.254 queries on left"),
    ],
    "ipv6-addresses": [
        ({f"{IPV6}/conf/left/disable_ipv6": "1"}, SIX, "problem", "IPv6 is disabled on left"),
        ({}, {"relay": running((rule6(),))}, "problem", "left has no IPv6 address that can be used"),
        ({}, {**SIX, "interfaces": NARROW}, "problem", "right has an MTU of 1000 bytes: without 1280"),
        ({}, {**SIX, "interfaces": LINK_LOCAL}, "note", "right has only a link-local address, fe80::1"),
        ({f"{IPV6}/conf/left/disable_ipv6": "1"}, {"relay": running((LEGS,))}, "problem", "IPv6 is disabled on left"),
        ({f"{IPV6}/conf/left/disable_ipv6": "0"}, SIX, "ok", "left has fd00:1::2"),
    ],
    "mld-version": [
        ({f"{IPV6}/conf/all/force_mld_version": "1"}, SIX, "note", "MLDv1 is forced on left"),
        ({f"{IPV6}/conf/left/force_mld_version": "1"}, PICKY, "warning", "though rules ask for sources"),
        ({f"{IPV6}/conf/left/force_mld_version": "0"}, PICKY, "ok", "no MLD version is forced on left"),
    ],
    "mld-sources": [
        ({f"{IPV6}/mld_max_msf": "0"}, PICKY, "problem", "no source can be asked for"),
        ({f"{IPV6}/mld_max_msf": "1"}, PICKY, "note", "2 sources of ff3e::1 take 2 sockets"),
        ({f"{IPV6}/mld_max_msf": "64"}, PICKY, "ok", "2 sources of ff3e::1 are wanted"),
    ],
    "mld-querier": [
        ({}, {**SIX, "probes": Probes(mld_queriers={})}, "note", "1 s are too short to tell"),
        (
            {},
            {**SIX, "probes": Probes(mld_queriers={}), "interval_s": 130.0},
            "warning",
            "no MLD query came in on left in 130 s",
        ),
        ({}, {**SIX, "probes": Probes(mld_queriers={"left": "fe80::254"})}, "ok", "fe80::254 queries on left"),
    ],
    "bridge": [
        (
            {f"{NET}/br0/bridge/multicast_snooping": "1", f"{NET}/br0/bridge/multicast_querier": "0"},
            {},
            "note",
            "br0 snoops and is no querier",
        ),
        (
            {
                f"{NET}/br0/bridge/multicast_snooping": "1",
                f"{NET}/br0/bridge/multicast_querier": "0",
                f"{NET}/br0/brif/left/port_no": "0x1",
            },
            {},
            "warning",
            "br0 snoops and is no querier",
        ),
        (
            {f"{NET}/br0/bridge/multicast_snooping": "1", f"{NET}/br0/bridge/multicast_querier": "1"},
            {},
            "ok",
            "snoops and queries",
        ),
    ],
    "offloads": [
        ({}, {"probes": Probes(offloads={"left": {"rx-gro": False}})}, "note", "GRO off"),
        ({}, {"probes": Probes(offloads={"left": {"rx-gro": True, "rx-lro": True}})}, "note", "LRO on"),
        ({}, {"probes": Probes(offloads={"left": {"rx-gro": True, "rx-checksum": False}})}, "note", "no checksums"),
        ({}, {"probes": Probes(offloads={"left": {"rx-gro": True, "rx-checksum": True}})}, "ok", "rx-gro"),
    ],
    "mtu": [
        ({}, {"relay": running(), "interfaces": SMALL}, "warning", "payloads over 972 bytes leave as fragments"),
        (
            {},
            {
                "relay": running((rule6(),)),
                "interfaces": {**WITH_IPV6, "right": msgspec.structs.replace(WITH_IPV6["right"], mtu_bytes=1280)},
            },
            "warning",
            "payloads over 1232 bytes leave as fragments",
        ),
        ({}, {"relay": running()}, "ok", "no rule sends to a smaller MTU"),
    ],
    "nic-drops": [
        (
            {f"{NET}/left/statistics/rx_missed_errors": "9"},
            {"earlier": {f"{NET}/left/statistics/rx_missed_errors": "4"}},
            "problem",
            "rx_missed_errors of left grew by 5 in 1 s, to 9",
        ),
        (
            {f"{NET}/left/statistics/rx_dropped": "9"},
            {"earlier": {f"{NET}/left/statistics/rx_dropped": "4"}},
            "warning",
            "rx_dropped of left grew by 5",
        ),
        (
            {f"{NET}/left/statistics/rx_fifo_errors": "9"},
            {"earlier": {f"{NET}/left/statistics/rx_fifo_errors": "9"}},
            "note",
            "is 9, and did not grow",
        ),
        ({f"{NET}/left/statistics/rx_dropped": "0"}, {}, "ok", "has dropped nothing"),
    ],
    "softnet-drops": [
        (
            {"proc/net/softnet_stat": SOFTNET.format(dropped="0000000b")},
            {"earlier": {"proc/net/softnet_stat": SOFTNET.format(dropped="00000001")}},
            "problem",
            "10 on core 1",
        ),
        (
            {"proc/net/softnet_stat": SOFTNET.format(dropped="0000000b")},
            {"earlier": {"proc/net/softnet_stat": SOFTNET.format(dropped="0000000b")}},
            "note",
            "11 frames since it started",
        ),
        ({"proc/net/softnet_stat": SOFTNET.format(dropped="00000000")}, {}, "ok", "dropped nothing"),
    ],
    "exclusive": [({}, {"probes": Probes(exclusive={"left": "mcr"})}, "note", "kept from other programs")],
    "interrupts": [
        (
            {**IRQ, "proc/irq/30/effective_affinity_list": "1-3"},
            {"relay": running()},
            "note",
            "interrupt 30 of left comes on core 1, a worker's",
        ),
        ({**IRQ, "proc/irq/30/smp_affinity_list": "0"}, {"relay": running()}, "ok", "on core 0, no worker's"),
    ],
    "isolated-cores": [
        ({f"{CPU}/isolated": "2-3"}, {"relay": running()}, "note", "workers' cores 1"),
        ({f"{CPU}/isolated": "1"}, {"relay": running()}, "ok", "isolated"),
    ],
    "governor": [
        ({f"{CPU}/cpu1/cpufreq/scaling_governor": "powersave"}, {"relay": running()}, "note", "powersave"),
        ({f"{CPU}/cpu1/cpufreq/scaling_governor": "performance"}, {"relay": running()}, "ok", "performance"),
    ],
    "relay": [
        ({}, {}, "note", "no relay answers: host checks only"),
        ({}, {"relay": running(is_private=False)}, "note", "may not be looked at"),
        ({}, {"relay": running()}, "ok", "mcrd 0.1.0 answers, with 1 rule"),
    ],
    "rules": [
        ({}, {"relay": running(state="waiting: interface left is down")}, "problem", "rule r1 waiting: interface left"),
        ({}, {"relay": running()}, "ok", "1 rule active"),
    ],
    "protection": [
        ({}, {"relay": protected(delivers=(True, False))}, "warning", "nothing comes by the secondary leg of tv (b)"),
        ({}, {"relay": protected(active="secondary")}, "warning", "tv went over to the secondary leg"),
        ({}, {"relay": protected()}, "ok", "both legs of 1 protected rules deliver"),
    ],
    "workers": [
        ({}, {"relay": running(is_excluded=True)}, "problem", "others have its traffic"),
        ({"proc/7/stat": "7 (mcr) x) T 1 7"}, {"relay": running()}, "problem", "is stopped by a signal"),
        ({}, {"relay": running(uptime_s=3.0)}, "warning", "was replaced 3 s ago"),
        ({}, {"relay": running(ring_fill_max_percent=95)}, "warning", "95 % full or more"),
        ({"proc/7/stat": "7 (mcr) S 1 7"}, {"relay": running()}, "ok", "the worker of core 1 runs"),
    ],
    "drops": [
        ({}, {"relay": running(drops={"ring_full": 5})}, "warning", "ring_full 5: frames found the packet ring full"),
        (
            {},
            {"relay": running(drops={"ring_full": 5}), "relay_earlier": running(drops={"ring_full": 2})},
            "problem",
            "ring_full 5, 3 of them in the last 1 s",
        ),
        (
            {},
            {"relay": running(drops={"send_error": 4, "send_error_errno_1": 4})},
            "warning",
            "send_error_errno_1 4: sendmsg: EPERM",
        ),
        ({}, {"relay": running(drops={"no_match": 5})}, "note", "not from its source"),
        ({}, {"relay": running()}, "ok", "nothing was dropped"),
    ],
    "log": [
        ({}, {"probes": Probes(log_dropped={"mcr_supervisor": 3}), "relay": running()}, "warning", "3 log records"),
        ({}, {"probes": Probes(log_dropped={"mcr_supervisor": 0}), "relay": running()}, "ok", "no log record"),
    ],
}
ALL = [(name, *case) for name, cases in CASES.items() for case in cases]


@pytest.mark.parametrize(("name", "files", "facts", "severity", "text"), ALL, ids=[f"{c[0]}: {c[4]}" for c in ALL])
def test_a_check_says_what_is_there(
    tmp_path: Path, name: str, files: dict[str, str], facts: dict[str, Any], severity: str, text: str
) -> None:
    found = list(REGISTRY[name].find(situation(tmp_path, files, **facts)))
    hits = [each for each in found if text in each.text]
    assert [each.severity for each in hits] == [severity], found
    assert severity == "ok" or hits[0].remedy
    assert hits[0].read


def test_every_check_has_a_case_that_is_well_and_one_that_is_not() -> None:
    assert set(CASES) == set(REGISTRY)
    for name, cases in CASES.items():
        severities = {severity for _, _, severity, _ in cases}
        assert severities - {"ok"}, name
        assert "ok" in severities or name == "exclusive"
        assert REGISTRY[name].why


def test_ipv6_is_nothing_to_relays_that_have_none(tmp_path: Path) -> None:
    files = {
        f"{IPV6}/conf/left/disable_ipv6": "1",
        f"{IPV6}/mld_max_msf": "0",
        f"{IPV6}/conf/all/force_mld_version": "1",
    }
    found = run(situation(tmp_path, files, relay=running()))
    assert not [finding for finding in found if "mld" in finding.check or "ipv6" in finding.check]


def test_a_host_that_tells_nothing_is_no_error(tmp_path: Path) -> None:
    for facts in ({}, {"relay": running()}, {"relay": running(())}):
        findings = run(situation(tmp_path, {}, **facts))
        assert {finding.check for finding in findings} <= set(REGISTRY)
        order = [("problem", "warning", "note", "ok").index(finding.severity) for finding in findings]
        assert order == sorted(order)


def test_the_errno_takes_the_place_of_the_cause_that_says_less(tmp_path: Path) -> None:
    there = running(drops={"send_error": 4, "send_error_errno_1": 4})
    texts = [found.text for found in REGISTRY["drops"].find(situation(tmp_path, {}, relay=there))]
    assert texts == ["send_error_errno_1 4: sendmsg: EPERM, Operation not permitted"]


def test_every_cause_of_a_drop_has_a_meaning_and_a_remedy() -> None:
    assert set(MEANINGS) == set(DropCause) - {DropCause.NONE}
    for cause in NO_DROPS:
        assert meaning_of(cause).text
        assert meaning_of(cause).remedy
    assert "ENETUNREACH" in meaning_of("send_error_errno_101").text


def test_counters_are_those_that_the_folder_has(tmp_path: Path) -> None:
    files = {f"{NET}/left/statistics/rx_dropped": "1", f"{NET}/left/statistics/rx_bytes": "2"}
    assert count(situation(tmp_path, files).files) == {f"{NET}/left/statistics/rx_dropped": "1"}


def test_the_kernels_own_files_are_read() -> None:
    """The same formats, from the kernel that runs: not only as this test believes that they are."""
    text = Files().text
    igmp = host.joined(text("proc/net/igmp") or "")
    assert igmp["lo"].groups["224.0.0.1"] >= 1
    assert igmp["lo"].querier in ("V1", "V2", "V3")
    assert host.joined("", text("proc/net/igmp6") or "")["lo"].groups["ff02::1"] >= 1
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.bind(("::1", 0))
        there = {udp.local for udp in host.udp_sockets(text("proc/net/udp6") or "")}
        assert ("::1", sock.getsockname()[1]) in there
    assert len(host.softnet(text("proc/net/softnet_stat") or "")) >= 1
    assert "IPReversePathFilter" in host.statistics(text("proc/net/netstat") or "", "TcpExt")
    soft, hard = host.limits(text("proc/self/limits") or "")["Max open files"]
    assert soft.isdecimal() or soft == "unlimited"
    assert host.limits(text("proc/self/limits") or "").keys() >= {"Max locked memory", "Max cpu time"}
    assert hard
    assert host.cpu_list("0-2,8") == {0, 1, 2, 8}
    assert host.cpu_list("") == set()
    found: list[Found] = list(REGISTRY["kernel"].find(Situation(files=Files())))
    assert found[0].severity == "ok"
