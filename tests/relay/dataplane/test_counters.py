"""The stats segment: what versions share of it, and what they don't."""

import os
from collections.abc import Iterator

import posix_ipc
import pytest

from relay.dataplane import layout
from relay.dataplane.counters import StatsHeader, StatsSegment, segment_name

INSTANCE = f"counters{os.getpid()}"


@pytest.fixture
def former() -> Iterator[posix_ipc.SharedMemory]:
    """The segment of a version whose layout ends earlier."""
    name = segment_name(0, INSTANCE)
    shm = posix_ipc.SharedMemory(f"/{name}", posix_ipc.O_CREX, mode=0o600)
    os.posix_fallocate(shm.fd, 0, layout.STATS_HEALTH_OFFSET)
    yield shm
    os.close(shm.fd)
    posix_ipc.unlink_shared_memory(f"/{name}")


def test_a_former_versions_worker_can_be_told_to_release_its_rings(former: posix_ipc.SharedMemory) -> None:
    with StatsHeader.attach(0, INSTANCE) as stats:
        stats.header["release"] = layout.RELEASE_NOW
        stats.ring_doorbell()
    written = os.pread(former.fd, layout.STATS_HEADER.itemsize, 0)
    places = [layout.offset_of(layout.STATS_HEADER, field) for field in ("release", "doorbell")]
    assert [int.from_bytes(written[at : at + 8], "little") for at in places] == [layout.RELEASE_NOW, 1]


def test_a_former_versions_counters_are_not_read_as_this_versions(former: posix_ipc.SharedMemory) -> None:
    with pytest.raises(ValueError, match="length"):
        StatsSegment.attach(0, INSTANCE)
