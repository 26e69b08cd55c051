"""mcrlog clean: what belongs to dead processes goes, a living one's never, a file that no log made never."""

import os
import pwd
from collections.abc import Callable

import pytest

from logging_shm import LogEntry, Severity
from logging_shm.cli.clean import STATS_MAGIC
from relay.dataplane.counters import StatsSegment
from relay.dataplane.layout import STATS_MAGIC as STATS_MAGIC_OF_RELAY
from tests.logging_shm.command import mcrlog, mcrlog_alone, mcrlog_as, mcrlog_json, ring_of
from tests.logging_shm.remnants import FOREIGN, REMNANTS, SHM, in_child, waiting


def left(instance: str) -> list[str]:
    return sorted(path.name.removeprefix(f"mcr_{instance}_") for path in SHM.glob(f"mcr_{instance}_*"))


def test_clean_removes_a_dead_process_rings_and_keeps_a_living_ones(instance: str) -> None:
    def write_and_die() -> None:
        ring = ring_of(instance)
        ring.write(LogEntry(Severity.Info, ring.facility, "unread"))

    in_child(write_and_die)
    with waiting(lambda: ring_of(instance, "controlplane")):
        result = mcrlog("clean", "--instance", instance)
        assert left(instance) == ["controlplane"]
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"removed mcr_{instance}_supervisor, 1 unread record\n1 removed, 1 in use\n"


def test_a_ring_whose_creator_or_writer_lives_is_kept(instance: str) -> None:
    in_child(lambda: ring_of(instance))

    def claim() -> None:
        from logging_shm import Segment

        Segment.attach(f"mcr_{instance}_supervisor").claim()

    with waiting(claim) as pid:
        assert mcrlog_json("clean", "--instance", instance)["kept"] == {f"mcr_{instance}_supervisor": pid}
    assert list(mcrlog_json("clean", "--instance", instance)["removed"]) == [f"mcr_{instance}_supervisor"]


def test_a_dry_run_tells_and_removes_nothing(instance: str) -> None:
    in_child(lambda: ring_of(instance))
    result = mcrlog("clean", "--dry-run", "--instance", instance)
    assert result.stdout == f"would remove mcr_{instance}_supervisor\n1 to remove, 0 in use\n"
    assert left(instance) == ["supervisor"]


def test_a_reused_pid_does_not_keep_a_segment(instance: str) -> None:
    ring = ring_of(instance)
    for owner in ("process_start_ticks", "creator_start_ticks"):
        ring.segment.set(owner, ring.segment.get(owner) - 1)
    mcrlog("clean", "--instance", instance)
    assert left(instance) == []


def test_only_the_instance_that_is_named_is_cleaned(instance: str) -> None:
    in_child(lambda: (ring_of(instance), ring_of(f"{instance}b")))
    mcrlog("clean", "--instance", instance)
    assert (left(instance), left(f"{instance}b")) == ([], ["supervisor"])


def test_without_an_instance_everything_dead_is_cleaned() -> None:
    make = "import tests.logging_shm.command as c; c.ring_of('a'); c.ring_of('b', 'dp_c0_ingress')"
    result = mcrlog_alone(f'${{MCRLOG%% *}} -c "{make}" && $MCRLOG clean && ls /dev/shm')
    assert result.stdout == "removed mcr_a_supervisor\nremoved mcr_b_dp_c0_ingress\n2 removed, 0 in use\n"


@pytest.mark.parametrize("make", REMNANTS.values(), ids=REMNANTS)
def test_what_is_half_made_or_damaged_goes_when_nobody_has_it_open(instance: str, make: Callable[[str], None]) -> None:
    name = f"mcr_{instance}_supervisor"
    make(name)
    with waiting(lambda: os.open(SHM / name, os.O_RDONLY)) as pid:
        assert mcrlog_json("clean", "--instance", instance)["kept"] == {name: pid}
    assert mcrlog("clean", "--instance", instance).stdout == f"removed {name}\n1 removed, 0 in use\n"


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_file_is_left_alone_and_named(instance: str, make: Callable[[str], None]) -> None:
    make(f"mcr_{instance}_supervisor")
    inode = (SHM / f"mcr_{instance}_supervisor").lstat().st_ino
    in_child(lambda: ring_of(instance, "controlplane"))
    result = mcrlog("clean", "--instance", instance)
    assert result.returncode == 0
    assert result.stderr.startswith(f"left alone: /dev/shm/mcr_{instance}_supervisor")
    assert result.stdout == f"removed mcr_{instance}_controlplane\n1 removed, 0 in use\n"
    assert (SHM / f"mcr_{instance}_supervisor").lstat().st_ino == inode


def test_the_counters_of_a_dead_worker_go_with_its_rings(instance: str) -> None:
    nobody = pwd.getpwnam("nobody").pw_uid
    assert int.from_bytes(STATS_MAGIC, "little") == STATS_MAGIC_OF_RELAY
    with waiting(lambda: StatsSegment.create(0, instance, nobody, -1)) as pid:
        assert mcrlog_json("clean", "--instance", instance)["kept"] == {f"mcr_{instance}_dp_c0_stats": pid}
    mcrlog("clean", "--instance", instance)
    assert left(instance) == []


def test_who_may_not_read_a_segment_removes_nothing_and_is_told(instance: str) -> None:
    in_child(lambda: ring_of(instance))
    code, output = mcrlog_as("daemon", "clean", "--instance", instance)
    assert (code, left(instance)) == (1, ["supervisor"])
    assert f"left alone: /dev/shm/mcr_{instance}_supervisor" in output
    assert ": run as its owner or as root\n" in output


def test_who_can_not_tell_whether_a_remnant_is_in_use_leaves_it_alone(instance: str) -> None:
    name = f"mcr_{instance}_supervisor"
    REMNANTS["another version"](name)
    os.chown(SHM / name, pwd.getpwnam("daemon").pw_uid, -1)
    code, output = mcrlog_as("daemon", "clean", "--instance", instance)
    assert (code, left(instance)) == (1, ["supervisor"])
    assert "run as root" in output


def test_where_nothing_is_dead_nothing_is_removed(instance: str) -> None:
    assert mcrlog("clean", "--instance", instance).stdout == "0 removed, 0 in use\n"
    assert mcrlog_json("clean", "--instance", instance) == {"removed": {}, "kept": {}, "left_alone": []}
