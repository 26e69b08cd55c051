"""The benchmark: its arithmetic, and the smallest run of all parts end to end. No value of a run is judged here."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.bench.relay.parts import PARTS
from tools.bench.relay.results import FLAT_OUT, WIRE, Case, Results
from tools.bench.relay.search import Point, highest_lossless
from tools.bench.relay.sink import Counted
from tools.bench.relay.targets import judge
from tools.environment import CHECKOUT

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
GENERATOR_PPS = 1_000_000.0


def relay_that_holds(pps: float) -> Callable[[float, float], Point]:
    """A relay that loses what exceeds its rate, behind a generator with a limit."""

    def attempt(rate: float, seconds: float) -> Point:
        offered = min(rate or GENERATOR_PPS, GENERATOR_PPS)
        return Point(offered, max(0.0, 1 - pps / offered))

    return attempt


@given(st.floats(20_000, 990_000))
def test_the_search_finds_the_rate_that_a_relay_holds(pps: float) -> None:
    found = highest_lossless(relay_that_holds(pps), steps=8, step_s=1, confirm_s=1)
    assert pps - GENERATOR_PPS / 2**8 <= found.pps <= pps
    assert not found.is_generators


def test_a_relay_faster_than_the_generator_is_told() -> None:
    found = highest_lossless(relay_that_holds(2 * GENERATOR_PPS), steps=8, step_s=1, confirm_s=1)
    assert found == (GENERATOR_PPS, True)


def test_what_holds_only_for_short_is_not_confirmed() -> None:
    def attempt(rate: float, seconds: float) -> Point:
        return relay_that_holds(500_000 if seconds < 5 else 450_000)(rate, seconds)

    assert highest_lossless(attempt, steps=8, step_s=1, confirm_s=10).pps <= 450_000


@given(st.integers(1, 60), st.integers(1, 500), st.integers(64, 1472))
def test_datagrams_follow_from_superframes_and_bytes(each: int, frames: int, size: int) -> None:
    before = Counted(7, 7 * 92)
    after = Counted(7 + frames, 7 * 92 + frames * (28 + each * size))
    assert after.datagrams(before, size) == each * frames


def test_targets_without_figures_are_not_judged() -> None:
    assert judge(Results()) == []


def test_a_target_compares_medians() -> None:
    results = Results()
    for value in (1_000_000.0, 6_000_000.0, 7_000_000.0):
        results.add("throughput", Case("mcr", 1316, WIRE), out_per_cpu_s=value)
    results.add("throughput", Case("one-by-one", 1316, WIRE), out_per_cpu_s=1_000_000.0)
    (verdict,) = judge(results)
    assert (verdict.value, verdict.passed) == (6.0, True)


def test_of_several_rates_the_worst_decides() -> None:
    results = Results()
    for rate, beyond_ns in ((300_000.0, 100.0), (FLAT_OUT, 900.0)):
        results.add("cpu", Case("mcr", 1316, WIRE, rate), beyond_generator_ns=beyond_ns)
        results.add("cpu", Case("smcroute", 1316, WIRE, rate), beyond_generator_ns=1000.0)
    (verdict,) = judge(results)
    assert (verdict.value, verdict.passed) == (0.9, False)


FIELDS = {
    "throughput": {"lossless_pps", "generators_limit", "flat_out_pps", "flat_out_loss", "out_per_cpu_s", "saturated"},
    "cpu": {"achieved_pps", "generator_ns", "beyond_generator_ns", "worker_ns", "loss"},
    "streams": {"offered_pps", "out_per_cpu_s", "worker_ns", "loss", "saturated"},
    "fanout": {"offered_pps", "out_per_cpu_s", "worker_ns", "loss", "saturated"},
    "rules": {"offered_pps", "out_per_cpu_s", "worker_ns", "loss", "saturated"},
    "backlog": {"out_per_cpu_s", "worker_ns", "loss"},
    "workers": {"out_per_cpu_s", "least_share", "loss"},
    "latency": {"p50_us", "p99_us", "p999_us", "max_us", "loss", "core_share"},
    "memory": {"total_mb", "supervisor_mb", "other_helpers_mb", "each_worker_mb", "rings_mb"},
    "start": {"first_packet_s"},
    "failover": {"next_packet_s", "silence_s", "lost"},
    "ping": {"wall_ms"},
    "endurance": {"seconds", "sent", "lost", "grown_mb", "worker_ns"},
}
SMALLEST = (
    *("--quick", "--seconds", "0.1", "--confirm-seconds", "0.1", "--sizes", "1316", "--peers", "nft,one-by-one"),
    *("--rules", "10", "--outputs", "4", "--streams", "1,4", "--workers", "2"),
    *("--latency-rates", "2000", "--idles", "adaptive", "--endurance-seconds", "1"),
)


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the smallest benchmark of all parts writes."""
    path = tmp_path_factory.mktemp("bench") / "figures.json"
    command = [sys.executable, "-m", "tools.bench.relay", *SMALLEST, "--json", str(path)]
    result = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(path.read_text())


@needs_root
def test_every_part_is_tried() -> None:
    assert list(FIELDS) == list(PARTS)


@needs_root
@pytest.mark.parametrize("part", FIELDS)
def test_a_part_has_its_figures(document: Any, part: str) -> None:
    figures = [figure for figure in document["figures"] if figure["part"] == part]
    assert {figure["metric"] for figure in figures} == FIELDS[part]
    for figure in figures:
        assert figure["min"] <= figure["median"] <= figure["max"]
        assert len(figure["values"]) >= 1


@needs_root
def test_peers_are_measured(document: Any) -> None:
    contenders = {figure["contender"] for figure in document["figures"] if figure["part"] == "cpu"}
    assert contenders == {"nobody", "mcr", "mcr exclusive", "nft", "one-by-one"}


@needs_root
def test_the_machine_is_described(document: Any) -> None:
    assert {"date", "cpu", "cores", "kernel", "mcr", "python", "numba", "nft"} <= set(document["machine"])


@needs_root
def test_targets_are_judged(document: Any) -> None:
    assert {"text", "value", "limit", "at_most", "passed"} == set(document["targets"][0])


@needs_root
def test_nothing_is_left(document: Any) -> None:
    leftovers = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert f"mcr{document['machine']['pid']}-" not in leftovers


@needs_root
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "speed"], "choose from throughput"),
        (["--peers", "netcat"], "choose from smcroute"),
        (["--sizes", "big"], "expected whole numbers"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", "tools.bench.relay", *arguments]
    result = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert message in result.stderr


@needs_root
def test_without_a_peer_its_installation_is_told(tmp_path: Path) -> None:
    for program in ("ip", "nft", "ethtool", "taskset"):
        (tmp_path / program).symlink_to(subprocess.check_output(["which", program], text=True).strip())
    command = [sys.executable, "-m", "tools.bench.relay", "--quick", "--only", "ping", "--peers", "smcroute"]
    environment = {**os.environ, "PATH": str(tmp_path)}
    result = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False, env=environment)
    assert "smcroute is not installed: apt-get install smcroute" in result.stdout
