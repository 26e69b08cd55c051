"""Generator and checker: what one sends the other finds right, and what is wrong is found wrong."""

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.system.harness import assert_perfect, receiving, send
from tools.addressing import UsageError, parse_rate, spread
from tools.environment import CHECKOUT
from tools.netns import Host
from tools.payload import HEADER_OFFSET, KINDS, fill, find_header, is_intact, template
from tools.receiving import bucket_ns, latency_bucket

SIZE = 188


@pytest.mark.parametrize(
    ("text", "pps"),
    [("50000", 50_000), ("50kpps", 50_000), ("1Mpps", 1e6), ("10Mbps", 1250), ("1Gbit/s", 125_000), ("max", 0)],
)
def test_rates_are_read(text: str, pps: float) -> None:
    assert parse_rate(text, 1000) == pps


@pytest.mark.parametrize("text", ["", "fast", "0", "-5", "5 mps"])
def test_rates_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--rate"):
        parse_rate(text, 1000)


def test_flows_are_spread_over_groups_ports_or_source_ports() -> None:
    assert spread("239.1.1.255", 5, 2, "group") == [("239.1.1.255", 5), ("239.1.2.0", 5)]
    assert spread("239.1.1.1", 5, 2, "port") == [("239.1.1.1", 5), ("239.1.1.1", 6)]
    assert spread("239.1.1.1", 5, 2, "source-port") == [("239.1.1.1", 5)] * 2
    with pytest.raises(UsageError, match="ports from 1 to 65535"):
        spread("239.1.1.1", 65_535, 2, "port")


@given(st.sampled_from(sorted(KINDS)), st.integers(44, 1500), st.integers(0, 100), st.data())
def test_a_payload_is_intact_until_any_byte_changes(kind: str, length: int, sequence: int, data: st.DataObject) -> None:
    payload = template(KINDS[kind], length, seed=1)
    offset = HEADER_OFFSET[KINDS[kind]]
    fill(payload.ctypes.data, length, KINDS[kind], offset, 3, sequence, 77, 99)
    assert find_header(payload.ctypes.data, length) == offset
    assert is_intact(payload.ctypes.data, length, offset)
    place = data.draw(st.integers(0, length - 1))
    payload[place] ^= data.draw(st.integers(1, 255))
    changed_magic = offset <= place < offset + 4
    assert changed_magic or not is_intact(payload.ctypes.data, length, offset)


@given(st.integers(0, 1 << 50))
def test_latency_buckets_are_within_three_percent(latency_ns: int) -> None:
    floor = bucket_ns(latency_bucket(latency_ns))
    assert floor <= max(latency_ns, 1) < floor + max(floor / 31, 1) + 1


@pytest.mark.parametrize("payload", ["seq", "rtp", "ts", "random"])
def test_what_is_sent_is_received_and_right(tmp_path: Path, payload: str) -> None:
    with Host("lo") as host:
        to = ("--group", "239.1.1.1", "--port", "5001")
        with receiving(host, tmp_path, *to, "--count", "5000", "--expect", "5000") as summary:
            sent = send(host, "--payload", payload, "--count", "5000", "--rate", "20000", "--flows", "3")
            result = summary()
    assert sent["datagrams"] == 5000
    assert_perfect(result, 5000)
    assert (result["ok"], result["flows"]) == (True, 3)


def datagrams(count: int) -> list[bytes]:
    """Payloads as the generator sends them."""
    made = []
    for sequence in range(count):
        payload = template(KINDS["seq"], SIZE, seed=1)
        fill(payload.ctypes.data, SIZE, KINDS["seq"], 0, 0, sequence, 1, 42)
        made.append(payload.tobytes())
    return made


def without(payloads: list[bytes]) -> list[bytes]:
    return payloads[:5] + payloads[7:]


def doubled(payloads: list[bytes]) -> list[bytes]:
    return payloads[:5] + payloads[4:]


def swapped(payloads: list[bytes]) -> list[bytes]:
    return [*payloads[:5], payloads[6], payloads[5], *payloads[7:]]


def altered(payloads: list[bytes]) -> list[bytes]:
    return [*payloads[:5], payloads[5][:-1] + b"!", *payloads[6:]]


def strange(payloads: list[bytes]) -> list[bytes]:
    return [*payloads, b"?" * 100]


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (without, {"lost": 2}),
        (doubled, {"duplicated": 1}),
        (swapped, {"reordered": 1}),
        (altered, {"corrupt": 1, "lost": 1}),
        (strange, {"foreign": 1}),
    ],
)
def test_every_fault_is_found(
    tmp_path: Path, fault: Callable[[list[bytes]], list[bytes]], found: dict[str, int]
) -> None:
    payloads = fault(datagrams(20))
    with Host("lo") as host:
        to = ("--group", "127.0.0.1", "--port", "5001", "--count", str(len(payloads)))
        with receiving(host, tmp_path, *to) as summary:
            with host.inside():
                sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            with sock:
                for payload in payloads:
                    sock.sendto(payload, ("127.0.0.1", 5001))
            result = summary()
    faults = {key: result[key] for key in ("lost", "duplicated", "reordered", "corrupt", "foreign") if result[key]}
    assert faults == found
    assert not result["ok"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--interface", "nowhere"], "this host has"),
        (["--group", "ff3e::1"], "give an IPv4 address"),
        (["--rate", "fast"], "expected 50000"),
        (["--size", "70000"], "from 0 to 65507"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], message: str) -> None:
    command: list[Any] = [sys.executable, "tools/send_mcast.py", *arguments]
    result = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert message in result.stderr


@pytest.mark.parametrize(("expect", "exit_code", "said"), [([], 1, "nothing came\nnot ok\n"), (["0"], 0, "\nok\n")])
def test_a_receiver_to_which_nothing_came_is_not_satisfied(expect: list[str], exit_code: int, said: str) -> None:
    options = ["--duration", "0.2", *(["--expect", *expect] if expect else [])]
    with Host("silent") as host:
        command = [sys.executable, "tools/recv_mcast.py", "--quiet", *options]
        result = host.run(command, capture_output=True, cwd=CHECKOUT)
    assert (result.returncode, result.stdout.endswith(said)) == (exit_code, True), result.stdout + result.stderr


def test_a_recording_holds_the_payloads(tmp_path: Path) -> None:
    record = tmp_path / "record"
    payloads = datagrams(10)
    with Host("lo") as host:
        to = ("--group", "127.0.0.1", "--port", "5001", "--count", "10", "--record", str(record))
        with receiving(host, tmp_path, *to) as summary:
            with host.inside():
                sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            with sock:
                for payload in payloads:
                    sock.sendto(payload, ("127.0.0.1", 5001))
            assert json.dumps(summary())
    assert record.read_bytes() == b"".join(payloads)
    assert np.frombuffer(payloads[0], np.uint8).size == SIZE
