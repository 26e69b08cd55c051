"""Set-up from nothing: virtual environment, locked packages, the package itself, compiled code. Standard library only.

`make setup` runs it with the system's Python; a second run finds everything in place and ends at once. With
`--programs` it also installs what the tests need from the distribution. Every refusal is one line with its remedy.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

CHECKOUT = Path(__file__).resolve().parents[1]
VENV = CHECKOUT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "installed"
LOCK = CHECKOUT / "requirements.lock"
PYTHON_MIN = (3, 11)
# program: Debian packages
PROGRAMS = {
    "ip": "iproute2",
    "ffmpeg": "ffmpeg",
    "setpriv": "util-linux",
    "sysctl": "procps",
    "strace": "strace",
    "cc": "gcc libc6-dev",
    "mount": "mount",
    "rsyslogd": "rsyslog",
    "journalctl": "systemd",
    "nft": "nftables",
    "ethtool": "ethtool",
    "tmux": "tmux",
    "tshark": "tshark",
    "promtool": "prometheus",
    "mandoc": "mandoc",
    "logrotate": "logrotate",
    "zsh": "zsh",
    "fish": "fish",
}


def fail(message: str) -> NoReturn:
    """End with one line."""
    sys.exit(f"setup: {message}")


def tell(message: str) -> None:
    """Say what takes its time."""
    print(f"setup: {message} …", file=sys.stderr, flush=True)


def run(*command: str) -> None:
    """Run a command; its own output says what went wrong."""
    result = subprocess.run(command, cwd=CHECKOUT, check=False)
    if result.returncode:
        fail(f"`{' '.join(command)}` failed with status {result.returncode}")


def fingerprint(*paths: Path) -> str:
    """A hash of the contents of files."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def check_python() -> None:
    """The Python that makes the environment must be new enough and able to."""
    if sys.version_info < PYTHON_MIN:
        present = ".".join(map(str, sys.version_info[:3]))
        fail(f"Python {present} is too old: install Python 3.11 or newer, or run `make PYTHON=python3.11 …`")
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        fail("this Python can't make virtual environments: run `apt install python3-venv`")


def install() -> bool:
    """Make the environment and install from the lock file, unless that was done for these very files."""
    wanted = fingerprint(LOCK, CHECKOUT / "pyproject.toml")
    if STAMP.exists() and STAMP.read_text() == wanted and PYTHON.exists():
        return False
    check_python()
    tell("installing the locked packages into .venv: a minute")
    run(sys.executable, "-m", "venv", str(VENV))
    pip = (str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*pip, "--require-hashes", "-r", str(LOCK))
    run(*pip, "--no-deps", "--no-build-isolation", "-e", str(CHECKOUT))
    STAMP.write_text(wanted)
    return True


def compile_ahead() -> bool:
    """Fill the cache of compiled code, unless it is there for these very sources."""
    folders = ("relay/dataplane", "logging_shm", "tools")
    sources = [source for folder in folders for source in sorted((CHECKOUT / folder).glob("*.py"))]
    stamp = VENV / "compiled"
    wanted = fingerprint(*sources)
    if stamp.exists() and stamp.read_text() == wanted:
        return False
    tell("compiling the data path: a minute")
    run(str(PYTHON), "-m", "logging_shm.precompile")
    run(str(PYTHON), "-m", "relay.dataplane.precompile")
    run(str(PYTHON), "-m", "tools.precompile")
    run(str(PYTHON), "-m", "compileall", "-q", "relay", "logging_shm", "tools")
    stamp.write_text(wanted)
    return True


def hand_over() -> None:
    """Behind sudo, the environment and the byte code belong to the caller."""
    if os.geteuid() != 0 or "SUDO_UID" not in os.environ:
        return
    uid, gid = int(os.environ["SUDO_UID"]), int(os.environ["SUDO_GID"])
    made = [VENV, *VENV.rglob("*"), *CHECKOUT.glob("*.egg-info"), *CHECKOUT.glob("*.egg-info/*")]
    for folder in ("relay", "logging_shm", "tools"):
        for cache in (CHECKOUT / folder).rglob("__pycache__"):
            made += [cache, *cache.iterdir()]
    for path in made:
        os.chown(path, uid, gid, follow_symlinks=False)


def install_programs() -> None:
    """Install the programs that the tests use and this machine lacks."""
    missing = [name for program, names in PROGRAMS.items() if shutil.which(program) is None for name in names.split()]
    if not missing:
        return
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        fail(f"the tests need {', '.join(missing)}: install them, or run as root where apt-get is")
    tell(f"installing {', '.join(missing)}, which tests use")
    os.environ["DEBIAN_FRONTEND"] = "noninteractive"
    run("apt-get", "update", "-qq")
    run("apt-get", "install", "-qq", "-y", "--no-install-recommends", *missing)


def main() -> None:
    """Do what is missing."""
    installed = install()
    if "--programs" in sys.argv:
        install_programs()
    if compile_ahead() or installed:
        hand_over()


if __name__ == "__main__":
    main()
