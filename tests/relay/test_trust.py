"""Compiled code that somebody else could change is refused."""

import os
import pwd
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from relay.errors import PreflightError
from relay.trust import check_cache, trusted_uids

NOBODY = pwd.getpwnam("nobody")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="giving files away needs root")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache two levels below what others may write with the sticky bit, as /tmp is."""
    sticky = tmp_path / "tmp"
    cache = sticky / "prefix" / "cache"
    cache.mkdir(parents=True)
    sticky.chmod(0o1777)
    (cache / "module").mkdir()
    (cache / "module" / "function.nbc").touch(0o644)
    return cache


def test_a_cache_of_our_own_is_accepted(cache: Path) -> None:
    check_cache(cache, trusted_uids())


def test_a_cache_that_is_not_there_yet_is_judged_by_its_parents(cache: Path) -> None:
    check_cache(cache / "other", trusted_uids())
    cache.chmod(0o777)
    with pytest.raises(PreflightError, match="chmod o-w"):
        check_cache(cache / "other", trusted_uids())


SPOIL: dict[str, Callable[[Path], None]] = {
    "others write it": lambda cache: cache.chmod(0o757),
    "others write it, with the sticky bit": lambda cache: cache.chmod(0o1757),
    "others write above it": lambda cache: cache.parent.chmod(0o757),
    "others write a file": lambda cache: (cache / "module" / "function.nbc").chmod(0o666),
    "others write a folder in it": lambda cache: (cache / "module").chmod(0o757),
}


def let_a_group_write(cache: Path) -> None:
    os.chown(cache, -1, NOBODY.pw_gid)
    cache.chmod(0o775)


SPOIL_AS_ROOT: dict[str, Callable[[Path], None]] = {
    "it is another's": lambda cache: os.chown(cache, NOBODY.pw_uid, -1),
    "what is above it is another's": lambda cache: os.chown(cache.parent, NOBODY.pw_uid, -1),
    "a file is another's": lambda cache: os.chown(cache / "module" / "function.nbc", NOBODY.pw_uid, -1),
    "a group writes it": let_a_group_write,
}


@pytest.mark.parametrize("how", SPOIL)
def test_what_others_can_write_is_refused(cache: Path, how: str) -> None:
    SPOIL[how](cache)
    with pytest.raises(PreflightError, match=r"can be written by .*: run `chmod o-w /"):
        check_cache(cache, trusted_uids())


@as_root
@pytest.mark.parametrize("how", SPOIL_AS_ROOT)
def test_what_is_anothers_is_refused(cache: Path, how: str) -> None:
    SPOIL_AS_ROOT[how](cache)
    with pytest.raises(PreflightError, match=r"run `ch(own root|mod g-w) /"):
        check_cache(cache, trusted_uids())


@as_root
def test_a_link_that_another_can_turn_is_refused(cache: Path) -> None:
    link = cache.parents[1] / "link"
    link.symlink_to(cache)
    check_cache(link, trusted_uids())
    os.chown(link, NOBODY.pw_uid, -1, follow_symlinks=False)
    with pytest.raises(PreflightError, match="link belongs to nobody"):
        check_cache(link, trusted_uids())


@as_root
def test_what_the_caller_behind_sudo_has_is_accepted(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caller = 4242
    os.chown(cache, caller, -1)
    with pytest.raises(PreflightError, match="belongs to 4242"):
        check_cache(cache, trusted_uids())
    monkeypatch.setenv("SUDO_UID", str(caller))
    check_cache(cache, trusted_uids())


def test_a_group_of_nobody_else_may_write(cache: Path) -> None:
    mine = pwd.getpwuid(os.geteuid())
    if any(user.pw_gid == mine.pw_gid and user.pw_uid != mine.pw_uid for user in pwd.getpwall()):
        pytest.skip("this user's group is not a private one")
    os.chown(cache, -1, mine.pw_gid)
    cache.chmod(0o775)
    check_cache(cache, trusted_uids())


@as_root
@pytest.mark.parametrize("start", ["supervisor", "template"])
def test_the_relay_and_its_template_refuse_in_one_line(tmp_path: Path, start: str) -> None:
    environment = tmp_path / "venv"
    (environment / "bin").mkdir(parents=True)
    home = Path(sys.executable).resolve().parent
    (environment / "bin" / "python").symlink_to(Path(sys.executable).resolve())
    (environment / "pyvenv.cfg").write_text(f"home = {home}\n")
    (environment / "lib").symlink_to(Path(sys.prefix) / "lib")
    (environment / "var").mkdir()
    os.chown(environment / "var", NOBODY.pw_uid, -1)
    modules = {
        "supervisor": ["relay", "supervisor", "--check", "--interface", "lo"],
        "template": ["relay.dataplane.template", "--fd", "0", "--handover-fd", "0", "--heir-uid", "0"],
    }
    arguments = [*modules[start], *(["--uid", "65534", "--gid", "65534"] if start == "template" else [])]
    result = subprocess.run(
        [environment / "bin" / "python", "-m", *arguments],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 1
    assert result.stderr == (
        f"mcrd: compiled code is not safe: {environment}/var belongs to nobody, who could change it: "
        f"run `chown root {environment}/var`\n"
    )


def test_what_is_to_be_compiled_first_is_told_by_a_command_that_an_installed_relay_has_too(tmp_path: Path) -> None:
    program = "import sys, pathlib; from relay.trust import check_compiled; check_compiled(pathlib.Path('/none/of'))"
    as_nobody = ["setpriv", f"--reuid={NOBODY.pw_uid}", f"--regid={NOBODY.pw_gid}", "--clear-groups"]
    result = subprocess.run(
        [*as_nobody, sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd="/"
    )
    assert f"run `{sys.executable} -m relay.dataplane.precompile` as root" in result.stderr
    command = [sys.executable, "-c", "import importlib.util as u; assert u.find_spec('relay.dataplane.precompile')"]
    assert subprocess.run(command, check=False, cwd=tmp_path).returncode == 0
