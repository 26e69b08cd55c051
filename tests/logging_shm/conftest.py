"""Rings with names of their own, unlinked after the test."""

import itertools
import os
from collections.abc import Callable, Iterator

import pytest

from logging_shm import SharedSPSCRingBuffer
from tests.logging_shm.command import new_instance
from tests.logging_shm.remnants import SHM, clear

MakeRing = Callable[..., SharedSPSCRingBuffer]
_serial = itertools.count(1)


@pytest.fixture
def instance() -> Iterator[str]:
    """A name of one's own; whatever a test left under it is removed."""
    instance = new_instance()
    yield instance
    for path in SHM.glob(f"mcr_{instance}*"):
        clear(path.name)


@pytest.fixture
def name() -> Iterator[str]:
    """A segment name; the segment is unlinked if the test made it."""
    name = f"mcr_test{os.getpid()}_{next(_serial)}"
    yield name
    if os.path.exists(f"/dev/shm/{name}"):  # noqa: PTH110
        os.unlink(f"/dev/shm/{name}")  # noqa: PTH108


@pytest.fixture
def make_ring(name: str) -> Iterator[MakeRing]:
    """Create the ring `name`."""
    rings: list[SharedSPSCRingBuffer] = []

    def make(capacity: int = 8, **options: object) -> SharedSPSCRingBuffer:
        rings.append(SharedSPSCRingBuffer.create(f"{name}_{len(rings)}", capacity, **options))  # type: ignore[arg-type]
        return rings[-1]

    yield make
    for ring in rings:
        ring.shutdown()
