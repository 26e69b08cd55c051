"""What a distribution packages: wheel and sdist, manual pages, completions, exit codes."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from relay.confinement.capabilities import AT_START, SUPERVISOR, Capability
from relay.errors import ExitCode
from relay.version import VERSION
from tools import man
from tools.environment import CHECKOUT

BIN = Path(sys.executable).parent
PAGE = CHECKOUT / "docs" / "packaging.md"
NOT_SOURCE = (".*", "*.egg-info", "build", "dist", "share", "__pycache__")


@pytest.fixture(scope="module")
def share(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make man` makes."""
    folder = tmp_path_factory.mktemp("share")
    subprocess.run([sys.executable, "-m", "tools.man", str(folder)], cwd=CHECKOUT, check=True)
    return folder


@pytest.fixture(scope="module")
def dist(share: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel that is built from it, of a copy of the sources."""
    copy = tmp_path_factory.mktemp("dist") / "source"
    shutil.copytree(CHECKOUT, copy, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    shutil.copytree(share, copy / "packaging" / "share")
    built = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", copy.parent / "built", copy],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr
    return copy.parent / "built"


def test_the_sdist_has_everything_that_is_needed_to_test_and_package(dist: Path) -> None:
    with tarfile.open(dist / f"mcr-{VERSION}.tar.gz") as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    listed = subprocess.run(["git", "ls-files"], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    wanted = [name for name in listed.stdout.splitlines() if not name.startswith(".") and (CHECKOUT / name).exists()]
    assert set(wanted) - names == {"MANIFEST.in"} - names
    assert {"packaging/systemd/mcr.service", "tests/system/harness.py", "packaging/share/man/man8/mcrd.8"} <= names


def test_an_installed_wheel_has_its_commands_pages_and_completions(dist: Path, tmp_path: Path) -> None:
    """In an environment of its own, with the packages that it needs from this one."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    wheel = dist / f"mcr-{VERSION}-py3-none-any.whl"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
    paths = sysconfig.get_paths(vars={"base": str(tmp_path / "venv"), "platbase": str(tmp_path / "venv")})
    (Path(paths["purelib"]) / "needed.pth").write_text(sysconfig.get_paths()["purelib"])
    for name in ("mcrd", "mcrctl", "mcrlog"):
        option = "--help" if name == "mcrlog" else "--version"
        result = subprocess.run(
            [python.parent / name, option], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.startswith("Usage: mcrlog" if name == "mcrlog" else f"{name}, version {VERSION}\n")
    where = subprocess.run(
        [python, "-c", "import relay; print(relay.__file__)"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert where.stdout.startswith(str(tmp_path))  # not the checkout's
    installed = tmp_path / "venv" / "share"
    for path in ("man/man8/mcrd.8", "bash-completion/completions/mcrctl", "doc/mcr/packaging.md"):
        assert (installed / path).is_file()
    assert (installed / "mcr" / "systemd" / "mcr.service").is_file()


def test_the_wheel_holds_only_the_two_packages(dist: Path) -> None:
    with zipfile.ZipFile(dist / f"mcr-{VERSION}-py3-none-any.whl") as wheel:
        top = {name.split("/")[0] for name in wheel.namelist()}
    assert top == {"relay", "logging_shm", f"mcr-{VERSION}.dist-info", f"mcr-{VERSION}.data"}


@pytest.mark.parametrize("page", ["man8/mcrd.8", "man1/mcrctl.1", "man1/mcrlog.1"])
def test_a_manual_page_is_well_formed_and_has_every_option(share: Path, page: str) -> None:
    file = share / "man" / page
    linted = subprocess.run(
        ["mandoc", "-T", "lint", "-W", "warning", file], capture_output=True, text=True, check=False
    )
    assert linted.stdout + linted.stderr == ""
    shown = subprocess.run(
        ["mandoc", "-T", "utf8", "-O", "width=200", file], capture_output=True, text=True, check=True
    )
    text = re.sub(r".\x08", "", shown.stdout)
    command = file.stem
    helped = subprocess.run([BIN / command, "--help"], capture_output=True, text=True, check=True).stdout
    options = set(re.findall(r"^  (--[\w-]+)", helped, re.MULTILINE)) - {"--help"}
    assert options <= set(re.findall(r"--[\w-]+", text)) | {"--help"}
    for section in ("NAME", "SYNOPSIS", "DESCRIPTION", "EXIT STATUS", "FILES", "SEE ALSO"):
        assert f"\n{section}\n" in text


def test_text_is_no_request_to_roff() -> None:
    assert man.escape(".so /etc/passwd\n'x \\fB --a") == "\\&.so /etc/passwd\n\\&'x \\efB \\-\\-a"


@pytest.mark.parametrize("program", ["mcrd", "mcrctl", "mcrlog"])
def test_shells_take_the_completions(share: Path, program: str) -> None:
    for shell, path in man.COMPLETIONS.items():
        subprocess.run([shell, "-n", share / path.format(program)], check=True)


def test_bash_and_fish_complete_commands(share: Path) -> None:
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    bash = f"""source {share}/bash-completion/completions/mcrctl
        COMP_WORDS=(mcrctl list-) COMP_CWORD=1; _mcrctl_completion mcrctl; echo "${{COMPREPLY[@]}}" """
    printed = subprocess.run(["bash", "-c", bash], env=environment, capture_output=True, text=True, check=True)
    assert printed.stdout.split() == ["list-rules", "list-workers"]
    fish = f"source {share}/fish/vendor_completions.d/mcrctl.fish; complete -C 'mcrctl list-'"
    printed = subprocess.run(["fish", "-c", fish], env=environment, capture_output=True, text=True, check=True)
    assert [line.split("\t")[0] for line in printed.stdout.splitlines()] == ["list-rules", "list-workers"]


def test_exit_codes_are_documented_as_they_are() -> None:
    rows = re.findall(r"^\| (\d) \| `(\w+)`", PAGE.read_text(), re.MULTILINE)
    assert [(int(number), name) for number, name in rows] == [(code.value, code.name) for code in ExitCode]
    assert [status for status, _ in man.PAGES["mcrctl"].statuses] == list(ExitCode)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["mcrctl", "--version"], ExitCode.OK),
        (["mcrctl", "add-rule", "--input-group", "1.2.3.4"], ExitCode.USAGE),
        (["mcrd", "--check"], ExitCode.USAGE),
        (["mcrd", "--check", "--interface", "nowhere"], ExitCode.FAILURE),
        (["mcrctl", "nothing"], ExitCode.USAGE),
        (["mcrctl", "--socket", "/nowhere/control.sock", "ping"], ExitCode.UNREACHABLE),
        (["mcrctl", "--socket", "/nowhere/control.sock", "metrics", "--once"], ExitCode.UNREACHABLE),
        (["mcrctl", "metrics", "--listen", "9464"], ExitCode.USAGE),
    ],
)
def test_exit_codes(command: list[str], code: ExitCode) -> None:
    result = subprocess.run([BIN / command[0], *command[1:]], capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stderr
    assert (result.stderr == "") == (code == ExitCode.OK)
    assert "Traceback" not in result.stderr


def test_a_container_is_given_the_capabilities_that_are_needed() -> None:
    """As docs/packaging.md says: what the supervisor keeps; and it names what it may have again at a new start."""
    given = re.findall(r"--cap-add=(\w+)", PAGE.read_text())
    assert sorted(f"CAP_{name}" for name in given) == sorted(Capability(number).name for number in SUPERVISOR)
    may = re.search(r"`SYS_NICE`, `SYS_PTRACE`, `SYS_RESOURCE`", PAGE.read_text())
    assert may is not None
    assert {Capability(number).name for number in AT_START - SUPERVISOR} == {
        "CAP_SYS_NICE",
        "CAP_SYS_PTRACE",
        "CAP_SYS_RESOURCE",
    }
