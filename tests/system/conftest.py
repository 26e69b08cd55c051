"""Fixtures of the system tests: a row of hosts, and relays on them that never outlive their test."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.system.harness import Relay
from tools.netns import Host, Line

StartRelay = Callable[..., Relay]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """System tests need root for namespaces and packet sockets."""
    if os.geteuid() != 0:
        for item in items:
            if "tests/system" in str(item.path):
                item.add_marker(pytest.mark.skip(reason="network namespaces and packet sockets need root"))


@pytest.fixture
def line() -> Iterator[Line]:
    """gen ─ relay ─ sink."""
    with Line("gen", "relay", "sink") as line:
        yield line


@pytest.fixture
def start_relay(tmp_path: Path) -> Iterator[StartRelay]:
    """Start relays: `start_relay(host, interfaces, workers, *options)`."""
    relays: list[Relay] = []

    def start(host: Host, interfaces: tuple[str, ...] = ("left",), workers: int = 1, *options: str) -> Relay:
        relays.append(Relay(host, tmp_path, interfaces, workers, *options))
        return relays[-1]

    yield start
    for relay in relays:
        relay.kill()
