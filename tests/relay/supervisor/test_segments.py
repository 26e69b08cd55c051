"""What a former relay left in /dev/shm: whose it is, what of it is rescued, what is removed, and what is refused."""

import itertools
import os
import pwd
from collections.abc import Callable, Iterator

import pytest

from logging_shm import Facility, SharedMemoryLogManager, SharedSPSCRingBuffer, SupervisorLogging
from relay.dataplane.counters import StatsSegment
from relay.dataplane.layout import STATS_BYTES
from relay.errors import PreflightError
from relay.supervisor.segments import names_of, remove_stale
from tests.logging_shm.remnants import FOREIGN, REMNANTS, SHM, clear, in_child, private, waiting

_serial = itertools.count(1)
WORKER_UID = pwd.getpwnam("nobody").pw_uid


@pytest.fixture
def instance() -> Iterator[str]:
    """An instance's name; whatever a test left under it is removed."""
    instance = f"seg{os.getpid()}-{next(_serial)}"
    yield instance
    for path in SHM.glob(f"mcr_{instance}*"):
        clear(path.name)


def make_relay(instance: str, records: int = 0) -> list[object]:
    """All segments of a relay with one worker, as a supervisor makes them; some records in one of its rings."""
    logs = SharedMemoryLogManager.create_for_worker(0, instance, uid=WORKER_UID)
    for number in range(records):
        logs.rings[Facility.Ingress].append(6, f"record {number}")
    control_plane = SharedSPSCRingBuffer.create(f"mcr_{instance}_controlplane", facility=Facility.ControlPlane)
    stats = StatsSegment.create(0, instance, WORKER_UID, -1)
    return [SupervisorLogging(instance), logs, control_plane, stats]


def test_all_that_a_killed_relay_left_is_removed_and_its_unread_records_are_rescued(instance: str) -> None:
    in_child(lambda: make_relay(instance, records=3))
    assert len(names_of(instance)) == 7
    stale = remove_stale(instance, WORKER_UID)
    assert (len(stale.names), len(stale.rings), stale.unread) == (7, 6, 3)
    (ingress,) = [ring for ring in stale.rings if ring.facility is Facility.Ingress]
    assert [read.message for _ in range(4) if (read := ingress.read())] == ["record 0", "record 1", "record 2"]
    assert names_of(instance) == []


def test_where_nothing_was_left_nothing_is_removed(instance: str) -> None:
    stale = remove_stale(instance)
    assert (stale.names, stale.rings, stale.unread) == ([], [], 0)


def test_a_living_supervisor_is_named_and_keeps_everything(instance: str) -> None:
    with waiting(lambda: make_relay(instance)) as pid:
        message = f"process {pid} uses /dev/shm/mcr_{instance}_supervisor: stop it, or choose another --instance"
        with pytest.raises(PreflightError, match=message):
            remove_stale(instance, WORKER_UID)
        assert len(names_of(instance)) == 7


def claim_all(instance: str) -> None:
    for name in names_of(instance):
        if "dp_c0" in name and not name.endswith("stats"):
            SharedSPSCRingBuffer.attach(name).segment.claim()


def test_a_worker_that_outlives_its_supervisor_and_does_not_end_is_named(instance: str) -> None:
    in_child(lambda: make_relay(instance))
    with waiting(lambda: claim_all(instance)) as pid, pytest.raises(PreflightError, match=f"process {pid} uses"):
        remove_stale(instance, WORKER_UID, patience_s=0)
    assert len(names_of(instance)) == 7


def test_an_instance_has_its_own_names_and_nobody_elses(instance: str) -> None:
    for other in (f"{instance}b", f"{instance}-b"):
        private(f"mcr_{other}_supervisor")
    private(f"mcr_{instance}_dp_c0_ingress")
    private(f"mcr_{instance}_of_somebody")
    assert names_of(instance) == [f"mcr_{instance}_dp_c0_ingress"]
    assert not [name for name in names_of(None) if instance in name]


@pytest.mark.parametrize("role", ["supervisor", "controlplane", "dp_c0_dataplane"])
@pytest.mark.parametrize("make", REMNANTS.values(), ids=REMNANTS)
def test_what_was_left_half_made_or_damaged_is_removed(instance: str, role: str, make: Callable[[str], None]) -> None:
    make(f"mcr_{instance}_{role}")
    stale = remove_stale(instance)
    assert (stale.names, stale.rings) == ([f"mcr_{instance}_{role}"], [])
    assert names_of(instance) == []


@pytest.mark.parametrize("role", ["supervisor", "dp_c0_ingress", "dp_c0_stats"])
@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_file_is_named_with_a_remedy_and_nothing_at_all_is_removed(
    instance: str, role: str, make: Callable[[str], None]
) -> None:
    in_child(lambda: make_relay(instance, records=1))
    name = f"mcr_{instance}_{role}"
    (SHM / name).unlink()
    make(name)
    before = (SHM / name).lstat()
    with pytest.raises(PreflightError, match=rf"/dev/shm/{name}.*: remove it, or choose another --instance"):
        remove_stale(instance, WORKER_UID)
    assert len(names_of(instance)) == 7
    after = (SHM / name).lstat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)


@pytest.mark.parametrize("role", ["supervisor", "dp_c0_ingress", "dp_c0_stats"])
def test_what_another_user_made_is_foreign(instance: str, role: str) -> None:
    in_child(lambda: make_relay(instance))
    name, stranger = f"mcr_{instance}_{role}", pwd.getpwnam("daemon").pw_uid
    os.chown(SHM / name, stranger, -1)
    with pytest.raises(PreflightError, match=rf"/dev/shm/{name} .*: remove it, or choose another --instance"):
        remove_stale(instance, WORKER_UID)
    assert len(names_of(instance)) == 7


@pytest.mark.parametrize("content", [b"", bytes(STATS_BYTES)], ids=["empty", "allocated only"])
def test_a_half_made_stats_segment_is_removed(instance: str, content: bytes) -> None:
    private(f"mcr_{instance}_dp_c0_stats", content)
    assert remove_stale(instance).names == [f"mcr_{instance}_dp_c0_stats"]


def test_a_stats_segment_that_a_process_maps_is_in_use(instance: str) -> None:
    name = f"mcr_{instance}_dp_c0_stats"
    with (
        waiting(lambda: StatsSegment.create(0, instance, WORKER_UID, -1)) as pid,
        pytest.raises(PreflightError, match=f"process {pid} uses /dev/shm/{name}"),
    ):
        remove_stale(instance, WORKER_UID, patience_s=0)
    assert remove_stale(instance, WORKER_UID).names == [name]


def test_another_version_of_a_living_relay_is_refused_by_its_pid(instance: str) -> None:
    name = f"mcr_{instance}_supervisor"

    def make() -> object:
        logging = SupervisorLogging(instance)
        logging.rings[Facility.Supervisor].segment.set("abi_version", 1)
        return logging

    with waiting(make) as pid, pytest.raises(PreflightError, match=f"process {pid} uses /dev/shm/{name}"):
        remove_stale(instance)
    assert remove_stale(instance).names == [name]


def test_a_reused_pid_does_not_keep_a_dead_supervisors_name(instance: str) -> None:
    ring = SharedSPSCRingBuffer.create(f"mcr_{instance}_supervisor", facility=Facility.Supervisor)
    for owner in ("process_start_ticks", "creator_start_ticks"):
        ring.segment.set(owner, ring.segment.get(owner) - 1)
    assert remove_stale(instance).names == [ring.segment.name]
