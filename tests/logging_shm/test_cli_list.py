"""mcrlog list, and what all its commands share: which rings are meant, how errors look, how little is loaded."""

import subprocess
import sys
from collections.abc import Callable

import pytest

from logging_shm import LogEntry, Severity, SharedSPSCRingBuffer
from logging_shm.cli.choose import is_of
from tests.logging_shm.command import mcrlog, mcrlog_alone, mcrlog_as, mcrlog_json, ring_of, screen_of
from tests.logging_shm.remnants import FOREIGN, REMNANTS, in_child, waiting


def fill(ring: SharedSPSCRingBuffer, count: int) -> None:
    for number in range(count):
        ring.write(LogEntry(Severity.Info, ring.facility, f"record {number}"))


def cells(output: str) -> dict[str, list[str]]:
    """The rows of a table by segment."""
    return {words[0]: words[1:] for line in output.splitlines() if (words := line.split())}


def test_list_tells_owner_level_fill_written_and_dropped(instance: str) -> None:
    def make() -> SharedSPSCRingBuffer:
        ring = ring_of(instance, capacity=4)
        fill(ring, 5)
        ring.read()
        ring.segment.level = Severity.Warning
        return ring

    with waiting(make) as pid:
        rows = cells(mcrlog("list", "--instance", instance).stdout)
    assert rows["segment"] == ["owner", "level", "fill", "written", "dropped"]
    assert rows[f"mcr_{instance}_supervisor"] == [str(pid), "alive", "warning", "75%", "4", "1"]


def test_list_shows_a_killed_process_as_dead(instance: str) -> None:
    in_child(lambda: ring_of(instance))
    assert cells(mcrlog("list", "--instance", instance).stdout)[f"mcr_{instance}_supervisor"][1] == "dead"
    (ring,) = mcrlog_json("list", "--instance", instance)
    assert (ring["alive"], ring["owner"]) == (False, None)


def test_a_ring_whose_writer_died_belongs_to_the_supervisor_that_made_it(instance: str) -> None:
    def claim_and_die() -> None:
        SharedSPSCRingBuffer.attach(f"mcr_{instance}_dp_c3_ingress").segment.claim()

    with waiting(lambda: ring_of(instance, "dp_c3_ingress", core=3)) as creator:
        in_child(claim_and_die)
        (ring,) = mcrlog_json("list", "--instance", instance)
        assert (ring["alive"], ring["owner"], ring["facility"], ring["core"]) == (False, creator, "Ingress", 3)


def test_list_takes_nothing_from_a_ring(instance: str) -> None:
    with ring_of(instance) as ring:
        fill(ring, 3)
        mcrlog("list")
        assert ring.unread() == 3


@pytest.mark.parametrize(
    ("name", "instance", "expected"),
    [
        ("mcr_a_supervisor", "a", True),
        ("mcr_ab_supervisor", "a", False),
        ("mcr_a-b_supervisor", "a", False),
        ("mcr_supervisor", "a", False),
        ("mcr_dp_c0_ingress", "dp", False),
        ("mcr_dp_c0_stats", "dp", False),
        ("mcr_dp_dp_c0_ingress", "dp", True),
        ("mcr_dp_supervisor", "dp", True),
        ("mcr_supervisor", None, True),
        ("mcr_ab_supervisor", None, True),
    ],
)
def test_an_instance_is_matched_whole(name: str, instance: str | None, expected: bool) -> None:
    assert is_of(name, instance) is expected


def test_list_shows_one_instance_only_or_one_facility_or_core(instance: str) -> None:
    rings = [ring_of(instance, "dp_c0_ingress", core=0), ring_of(instance, "dp_c1_ingress", core=1)]
    rings += [ring_of(instance, "dp_c1_egress", core=1), ring_of(f"{instance}b")]

    def listed(*options: str) -> list[str]:
        return [ring["segment"].removeprefix(f"mcr_{instance}") for ring in mcrlog_json("list", *options)]

    assert listed("--instance", instance) == ["_dp_c0_ingress", "_dp_c1_egress", "_dp_c1_ingress"]
    assert listed("--instance", instance, "--core", "1", "--facility", "Ingress") == ["_dp_c1_ingress"]
    assert {"_dp_c0_ingress", "b_supervisor"} <= set(listed())
    for ring in rings:
        ring.shutdown()


@pytest.mark.parametrize("make", REMNANTS.values(), ids=REMNANTS)
def test_what_a_log_left_unreadable_is_named_and_not_listed(instance: str, make: Callable[[str], None]) -> None:
    make(f"mcr_{instance}_supervisor")
    with ring_of(instance, "controlplane") as ring:
        result = mcrlog("list", "--instance", instance)
        assert result.returncode == 0
        assert set(cells(result.stdout)) == {"segment", ring.segment.name}
        assert result.stderr.startswith(f"mcrlog: not shown: /dev/shm/mcr_{instance}_supervisor ")
        assert result.stderr.endswith(": `mcrlog clean` removes it once nobody uses it\n")
        assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_file_is_named_only_where_a_relay_would_want_its_name(
    instance: str, make: Callable[[str], None]
) -> None:
    make(f"mcr_{instance}_supervisor")
    make(f"mcr_{instance}_stats")
    result = mcrlog("list", "--instance", instance)
    assert (result.returncode, result.stdout) == (0, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"mcrlog: not shown: /dev/shm/mcr_{instance}_supervisor")
    assert line.endswith(": a relay that needs this name does not start until it is removed")


def test_without_any_segment_list_says_so() -> None:
    result = mcrlog_alone("$MCRLOG list && $MCRLOG list --json")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "no log rings in /dev/shm: is a relay running?\n[]\n"


@pytest.mark.parametrize("command", ["tail", "dump", "stat"])
def test_without_any_segment_the_others_say_so_and_fail(command: str) -> None:
    result = mcrlog_alone(f"$MCRLOG {command}")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "mcrlog: no log rings in /dev/shm: is a relay running?\n"


@pytest.mark.parametrize("command", [["list"], ["tail"], ["tail", "-f"], ["dump"], ["stat"]])
def test_who_may_not_read_the_rings_is_told_whose_they_are(instance: str, command: list[str]) -> None:
    with ring_of(instance), ring_of(instance, "controlplane"):
        code, output = mcrlog_as("daemon", *command, "--instance", instance)
    assert code == 1
    assert output.startswith("mcrlog: 2 of root's segments may not be read: run as root")
    assert len(output.splitlines()) == 1


def test_who_names_a_ring_that_he_may_not_read_is_told_the_remedy(instance: str) -> None:
    with ring_of(instance) as ring:
        code, output = mcrlog_as("daemon", "dump", ring.segment.name)
    assert code == 1
    assert f"/dev/shm/{ring.segment.name}" in output
    assert output.endswith(": run as its owner or as root\n")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nope"], 2, "mcrlog: No such command 'nope': see `mcrlog --help`"),
        (["--nope"], 2, "--nope"),
        (["list", "--core", "x"], 2, "Invalid value for '--core': 'x' is not a valid integer"),
        (["list", "--core", "255"], 2, "255 is not in the range 0<=x<=254"),
        (["list", "surplus"], 2, "Got unexpected extra argument"),
        (["list", "--facility", "x"], 2, "'supervisor', 'controlplane', 'dataplane', 'ingress'"),
        (["tail", "--severity", "loud"], 2, "'loud' is not one of 'emergency', 'alert'"),
        (["tail", "--grep", "("], 2, "'(' is no regular expression: missing )"),
        (["tail", "--since", "5x"], 2, "'5x' is no time: expected 30s, 5m, 1h, or 2026-11-24T17:00:00"),
        (["tail", "--since", "9" * 400 + "d"], 2, "is no time"),
        (["tail", "--lines", "-1"], 2, "-1 is not in the range x>=0"),
        (["dump", "--last", "0"], 2, "0 is not in the range x>=1"),
        (["stat", "--interval-s", "0"], 2, "0.0 is not in the range x>=0.1"),
        (["dump", "mcr_nothing"], 1, "/dev/shm/mcr_nothing: No shared memory exists with the specified name"),
        (["dump", "a/b"], 1, "/dev/shm/a/b"),
        (["tail", "-f", "x" * 300], 1, "`mcrlog list` shows all"),
        (["stat", "/dev/shm/mcr_nothing"], 1, "/dev/shm/mcr_nothing"),
        (["dump", "--instance", "nobody-has-this"], 1, "no log ring is like that: `mcrlog list` without options"),
    ],
)
def test_a_wrong_command_line_is_told_in_one_line(arguments: list[str], code: int, message: str) -> None:
    result = mcrlog(*arguments)
    assert (result.returncode, result.stdout) == (code, "")
    assert result.stderr.startswith("mcrlog: ")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["list", "tail", "dump", "stat", "clean"])
def test_every_command_has_help_with_examples_and_json(command: str) -> None:
    text = mcrlog(command, "--help").stdout
    assert f"Examples:\n    mcrlog {command}" in text
    assert "--json" in text
    assert "--instance" in text


def test_without_arguments_help_is_shown() -> None:
    result = mcrlog()
    assert result.returncode == 0
    for command in ("list", "tail", "dump", "stat", "clean"):
        assert f"\n  {command} " in result.stdout


@pytest.mark.parametrize("command", ["list", "clean"])
def test_neither_numpy_nor_numba_is_loaded(instance: str, command: str) -> None:
    script = (
        "import sys; from logging_shm.cli.main import main\n"
        f"main(['{command}', '--instance', '{instance}'], standalone_mode=False)\n"
        "print(sorted({'numpy', 'numba', 'llvmlite', 'rich'} & set(sys.modules)))"
    )
    in_child(lambda: ring_of(instance))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert f"mcr_{instance}_supervisor" in result.stdout
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["tail", "--help"], ["tail", "-n", "x"], ["dump", "mcr_nothing"]])
def test_neither_is_loaded_for_help_or_to_refuse_something(arguments: list[str]) -> None:
    script = (
        "import atexit, sys; from logging_shm.cli.main import main\n"
        "atexit.register(lambda: print(sorted({'numpy', 'numba', 'llvmlite'} & set(sys.modules))))\n"
        f"main({arguments})\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.stdout.splitlines()[-1] == "[]"


def test_a_list_fits_into_80_columns_whatever_the_relay_is_called(instance: str) -> None:
    longest = instance.ljust(24, "x")
    with ring_of(longest, "dp_c254_bufferpool") as ring, ring_of(longest) as other:
        other.segment.level = Severity.Emergency
        lines = screen_of(["list", "--instance", longest]).splitlines()
    assert max(map(len, lines)) <= 80
    assert ring.segment.name in lines


def test_a_list_of_usual_names_has_a_line_for_each(instance: str) -> None:
    with ring_of(instance, "dp_c0_bufferpool"), ring_of(instance, "dp_c0_ingress"):
        lines = screen_of(["list", "--instance", instance]).splitlines()
    assert len(lines) == 3
    assert max(map(len, lines)) <= 80
