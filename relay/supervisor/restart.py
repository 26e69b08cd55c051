"""Starting anew in place: the same process becomes the program that is installed now.

The command line is checked first with `--check`, by the new program, so that one that can't start leaves this one
running. `execute` then replaces the process image (man 2 execve): the pid stays, every descriptor is closed, and the
new supervisor finds the workers relaying, see orphans.py.
"""

import os
import subprocess
import sys
from collections.abc import Callable

from relay.confinement import capabilities
from relay.supervisor.timers import Timers

CHECK_S_MAX = 10.0
POLL_S = 0.05


class Restarter:
    """One check at a time."""

    def __init__(self, timers: Timers) -> None:
        self._timers = timers
        self._check: subprocess.Popen[str] | None = None

    def begin(self, agree: Callable[[], None], refuse: Callable[[str], None]) -> None:
        """Check whether the new program starts with this command line, then call one of the two."""
        if self._check is not None:
            refuse("a restart is under way")
            return
        with capabilities.passed_on():
            self._check = subprocess.Popen(
                [sys.executable, *sys.orig_argv[1:], "--check"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        self._poll(self._check, CHECK_S_MAX, agree, refuse)

    def _poll(
        self, check: "subprocess.Popen[str]", left_s: float, agree: Callable[[], None], refuse: Callable[[str], None]
    ) -> None:
        if check.poll() is None and left_s > 0:
            self._timers.after(POLL_S, lambda: self._poll(check, left_s - POLL_S, agree, refuse))
            return
        self._check = None
        check.kill()
        _, error = check.communicate()
        if check.returncode == 0:
            agree()
        else:
            reason = (error.strip().splitlines() or ["no answer"])[-1]
            refuse(f"not restarted, the relay goes on as it is: {reason}")

    def stop(self) -> None:
        """End a check that is under way."""
        if self._check is not None:
            self._check.kill()
            self._check.communicate()
            self._check = None

    @staticmethod
    def execute() -> None:
        """Become the new program. Raises OSError."""
        capabilities.pass_on()
        # The command line is this process's own.
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606
