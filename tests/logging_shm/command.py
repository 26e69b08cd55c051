"""Running mcrlog as its users do: to its end, in the background, as somebody else, on a terminal, on its own host."""

import contextlib
import fcntl
import itertools
import json
import os
import pwd
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from logging_shm import Facility, SharedSPSCRingBuffer
from logging_shm.cli import clean, dump, list_rings, stat, tail  # loaded before a child becomes another user
from logging_shm.cli.main import main

COMMANDS = (clean, dump, list_rings, stat, tail)
MCRLOG = [sys.executable, "-m", "logging_shm"]
DEADLINE_S = 30.0
POLL_S = 0.01
_serial = itertools.count(1)


def new_instance() -> str:
    """A name that no other relay of this host has."""
    return f"cli{os.getpid()}-{next(_serial)}"


def ring_of(instance: str, role: str = "supervisor", **options: Any) -> SharedSPSCRingBuffer:
    """A ring of an instance: `supervisor`, `dp_c0_ingress`."""
    facility = next(f for f in Facility if f.name.lower() == role.rpartition("_")[2])
    capacity = options.pop("capacity", 64)
    return SharedSPSCRingBuffer.create(f"mcr_{instance}_{role}", capacity, facility, **options)


def mcrlog(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run mcrlog to its end."""
    return subprocess.run([*MCRLOG, *arguments], capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def mcrlog_here(*arguments: str) -> str:
    """What mcrlog prints, run in this process, which has the compiled code loaded: for what is not about processes."""
    result = CliRunner().invoke(main, list(arguments), prog_name="mcrlog")
    assert result.exit_code == 0, result.output
    return result.stdout


def mcrlog_json(*arguments: str) -> Any:
    """Run mcrlog --json; what it printed."""
    result = mcrlog(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def mcrlog_alone(script: str) -> "subprocess.CompletedProcess[str]":
    """Run a shell script in which `$MCRLOG` is the command, with a /dev/shm that nobody else has."""
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", f"mount -t tmpfs none /dev/shm && {{ {script}; }}"],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        env={**os.environ, "MCRLOG": " ".join(MCRLOG)},
    )


def mcrlog_as(user: str, *arguments: str) -> tuple[int, str]:
    """Exit code and output of mcrlog that another user runs; with the modules that are loaded here."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setuid(pwd.getpwnam(user).pw_uid)
        result = CliRunner().invoke(main, list(arguments), prog_name="mcrlog")
        os.write(writer, json.dumps([result.exit_code, result.output]).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    with os.fdopen(reader) as answer:
        code, output = json.load(answer)
    return code, output


def until(condition: Callable[[], Any], what: Callable[[], object]) -> None:
    """Wait for a state."""
    end_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end_s, what()
        time.sleep(POLL_S)


class Running:
    """An mcrlog that goes on, as `tail -f` and `stat` do; what it prints goes to a file."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.out = folder / f"mcrlog-{next(_serial)}"
        with self.out.open("w") as out:
            self.process = subprocess.Popen([*MCRLOG, *arguments], stdout=out, stderr=subprocess.STDOUT, text=True)

    def text(self) -> str:
        """What it has printed so far."""
        return self.out.read_text()

    def wait_for(self, *texts: str) -> None:
        """Wait until all of these have been printed."""
        until(lambda: all(text in self.text() for text in texts) or self.process.poll() is not None, self.text)
        assert all(text in self.text() for text in texts), self.text()

    def interrupt(self) -> int:
        """End it as Ctrl-C does; its exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(DEADLINE_S)

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def terminal(columns: int, lines: int) -> Iterator[tuple[int, int]]:
    """A terminal of a size: our end and the program's."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    try:
        yield ours, theirs
    finally:
        os.close(ours)


def screen_of(arguments: Sequence[str], columns: int = 80, lines: int = 24) -> str:
    """What mcrlog prints to a terminal."""
    with terminal(columns, lines) as (ours, theirs):
        environment = {**os.environ, "TERM": "xterm"}
        environment.pop("COLUMNS", None)
        environment.pop("LINES", None)
        process = subprocess.Popen([*MCRLOG, *arguments], stdout=theirs, stderr=theirs, env=environment)
        os.close(theirs)
        printed = b""
        with contextlib.suppress(OSError):  # EIO: the program has closed its end
            while chunk := os.read(ours, 65536):
                printed += chunk
        assert process.wait(DEADLINE_S) == 0, printed
    return printed.decode()
