"""The environment that a service manager gives. man 3 sd_notify, sd_watchdog_enabled."""

import pytest

from relay.supervisor.service import manager_address, watchdog_interval_s


@pytest.mark.parametrize(
    ("environment", "interval_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "8"}, None),  # meant for another process, which passed it on
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_a_sign_of_life_is_wanted_twice_in_the_time(environment: dict[str, str], interval_s: float | None) -> None:
    assert watchdog_interval_s(environment, pid=7) == interval_s


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("/run/systemd/notify", "/run/systemd/notify"),
        ("@manager", "\0manager"),
        ("", None),
        ("vsock:2:1234", None),
        ("notify", None),
    ],
)
def test_addresses_of_a_manager(name: str, address: str | None) -> None:
    assert manager_address({"NOTIFY_SOCKET": name}) == address
