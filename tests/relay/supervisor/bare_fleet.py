"""A fleet without processes behind it, on lo in a namespace of its own, to test what the supervisor makes of it."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from logging_shm import LevelPolicy
from relay.rules import Rule
from relay.supervisor.fleet import Fleet
from relay.supervisor.ingress import Fanout
from relay.supervisor.interfaces import snapshot
from tools.netns import Host

RING_BYTES = 1 << 20  # 512 frames


@contextmanager
def bare_fleet(name: str, cores: Sequence[int], *rules: Rule) -> Iterator[Fleet]:
    """A fleet of these cores that has these rules. The test is skipped where namespaces can't be had."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces and packet sockets need root")
    with Host(name) as host, host.inside():
        owner = (os.geteuid(), os.getegid())
        fleet = Fleet(cores, f"{name}{os.getpid()}", owner, ["lo"], RING_BYTES, Fanout.hash, LevelPolicy())
        try:
            if rules:
                install(fleet, *rules)
            yield fleet
        finally:
            fleet.close()


def install(fleet: Fleet, *rules: Rule) -> None:
    """Go over to these rules."""
    fleet.begin(rules, snapshot(), strict=True)
    fleet.finish()


def read_all(ring: Any) -> Iterator[Any]:
    """What a log's ring holds."""
    while (entry := ring.read()) is not None:
        yield entry
