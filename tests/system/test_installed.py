"""The wheel, installed in an environment elsewhere, relays on lo. MCR_INSTALL=1 takes minutes: packages come from the
index then, and everything is compiled anew, by the steps of docs/packaging.md and packaging/Containerfile. Else the
packages and the compiled code are those that this checkout has.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import pytest

from relay.dataplane import CACHE_DIRECTORY
from tests.system.harness import Relay, assert_perfect, receiving, send
from tests.tools.test_packaging import NOT_SOURCE
from tools.environment import CHECKOUT
from tools.netns import Host

DATAGRAMS = 20_000
COMPILED = ("relay/dataplane", "logging_shm")


class Installed(Relay):
    """A relay of another environment."""

    bin: Path

    def launch(self, options: Sequence[str]) -> "subprocess.Popen[str]":
        command = [str(self.bin / "mcrd"), "--socket", str(self.socket), "--instance", self.instance, *options]
        with self.log.open("a") as out:
            return self.host.popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=self.bin)

    def control(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [str(self.bin / "mcrctl"), "--socket", str(self.socket), *arguments]
        return self.host.run(command, capture_output=True, cwd=self.bin)


def run(folder: Path, *command: str | Path) -> str:
    """Run a step to its end; return what it prints."""
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip()


def install_from_index(source: Path, folder: Path) -> None:
    """As a user does, with the versions that are locked."""
    python = folder / "venv" / "bin" / "python"
    lock = (CHECKOUT / "requirements.lock").read_text()
    constraints = folder / "constraints.txt"
    constraints.write_text(re.sub(r"^ .*\n", "", lock, flags=re.MULTILINE).replace("\\", ""))
    run(folder, sys.executable, "-m", "venv", folder / "venv")
    run(folder, python, "-m", "pip", "install", "--quiet", "--constraint", constraints, source)
    run(folder, python, "-m", "relay.dataplane.precompile")


def install_from_here(source: Path, folder: Path) -> None:
    """The same without the index and the compiler."""
    wheels, venv = folder / "wheels", folder / "venv"
    pip = [sys.executable, "-m", "pip"]
    run(folder, *pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, source)
    run(folder, sys.executable, "-m", "venv", "--without-pip", venv)
    run(folder, *pip, "--python", venv / "bin" / "python", "install", "--quiet", "--no-deps", "--no-index",
        *wheels.glob("mcr-*.whl"))  # fmt: skip
    paths = sysconfig.get_paths(vars={"base": str(venv), "platbase": str(venv)})
    (Path(paths["purelib"]) / "needed.pth").write_text(sysconfig.get_paths()["purelib"])
    move_compiled_code(Path(paths["purelib"]), folder)


def move_compiled_code(packages: Path, folder: Path) -> None:
    """Give the installed sources the code that was compiled of the same sources here.

    Numba knows a function's code by its file's directory, and by the file's time and size.
    """
    python = folder / "venv" / "bin" / "python"
    there = Path(run(folder, python, "-c", "from relay.dataplane import CACHE_DIRECTORY; print(CACHE_DIRECTORY)"))
    for package in COMPILED:
        ours, theirs = CHECKOUT / package, packages / package
        shutil.copytree(CACHE_DIRECTORY / numba_name(ours), there / numba_name(theirs))
        for source in theirs.glob("*.py"):
            times = (ours / source.name).stat()
            os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))


def compiled_code(folder: Path) -> list[Path]:
    """The files of compiled functions."""
    return sorted((folder / "venv" / "var").rglob("*.nbc"))


def numba_name(folder: Path) -> str:
    """numba.core.caching: get_suitable_cache_subpath."""
    return f"{folder.name}_{hashlib.sha1(str(folder).encode()).hexdigest()}"


@pytest.mark.timeout(900)
def test_an_installed_wheel_relays(tmp_path: Path) -> None:
    copy = tmp_path / "source"
    shutil.copytree(CHECKOUT, copy, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    install = install_from_index if os.environ.get("MCR_INSTALL") else install_from_here
    install(copy, tmp_path)
    shutil.rmtree(copy)
    Installed.bin = tmp_path / "venv" / "bin"
    assert str(tmp_path) in run(tmp_path, Installed.bin / "python", "-c", "import relay; print(relay.__file__)")
    compiled = compiled_code(tmp_path)
    with Host("installed") as host:
        relay = Installed(host, tmp_path, ("lo",))
        try:
            relay.add("tour", "239.1.1.1:5001", "239.2.2.2:6001:lo")
            with receiving(host, tmp_path, "--idle-timeout", "2") as summary:
                send(host, "--rate", "5000", "--count", str(DATAGRAMS))
                assert_perfect(summary(DATAGRAMS), DATAGRAMS)
            relay.stop()
        finally:
            relay.kill()
    assert compiled_code(tmp_path) == compiled, "something had to be compiled at the start"
