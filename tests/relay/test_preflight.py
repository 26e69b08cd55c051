"""What a machine may lack: each refusal names it and the remedy."""

import pytest

from relay.config import Options
from relay.errors import PreflightError
from relay.preflight import check_capabilities, check_interfaces, check_kernel, choose_cores
from relay.privileges import resolve_user

ALL = (1 << 41) - 1


def test_a_kernel_that_is_new_enough_passes() -> None:
    check_kernel("6.1.0-13-amd64", 0)
    check_kernel("7.0.1", 0)


@pytest.mark.parametrize(
    ("release", "disabled", "message"),
    [
        ("5.15.0", 0, "kernel 5.15.0 is too old: the relay needs Linux 6.1"),
        ("6.0.9", 0, "too old"),
        ("6.8.0", 1, "run `sysctl kernel.io_uring_disabled=0`"),
        ("6.8.0", 2, "run `sysctl kernel.io_uring_disabled=0`"),
    ],
)
def test_a_kernel_that_cannot_is_refused(release: str, disabled: int, message: str) -> None:
    with pytest.raises(PreflightError, match=message):
        check_kernel(release, disabled)


@pytest.mark.parametrize(("bit", "name"), [(12, "CAP_NET_ADMIN"), (13, "CAP_NET_RAW")])
def test_missing_capabilities_are_named(bit: int, name: str) -> None:
    check_capabilities(ALL)
    with pytest.raises(PreflightError, match=f"{name} is missing: start as root"):
        check_capabilities(ALL & ~(1 << bit))


def test_workers_get_the_first_allowed_cores_or_those_asked_for() -> None:
    assert choose_cores(Options(), (3, 5, 7)) == (3,)
    assert choose_cores(Options(num_workers=2), (3, 5, 7)) == (3, 5)
    assert choose_cores(Options(cores="7,3"), (3, 5, 7)) == (7, 3)
    assert choose_cores(Options(cores="7,3", num_workers=1), (3, 5, 7)) == (7,)


@pytest.mark.parametrize(
    "options", [Options(num_workers=4), Options(cores="4"), Options(cores="3,5", num_workers=3), Options(cores="3-4")]
)
def test_cores_that_are_not_there_are_refused(options: Options) -> None:
    with pytest.raises(PreflightError, match="core"):
        choose_cores(options, (3, 5, 7))


def test_an_unknown_interface_is_refused_with_those_there_are() -> None:
    with pytest.raises(PreflightError, match=r"no interface nowhere: this host has .*lo"):
        check_interfaces(["lo", "nowhere"])


def test_children_run_as_the_caller_of_sudo_else_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUDO_UID", raising=False)
    assert resolve_user(None, None) == resolve_user("nobody", None)
    assert resolve_user("daemon", None)[0] == 1
    monkeypatch.setenv("SUDO_UID", "1")
    assert resolve_user(None, None) == resolve_user("daemon", None)
    with pytest.raises(PreflightError, match="no group 'none-such'"):
        resolve_user("nobody", "none-such")
