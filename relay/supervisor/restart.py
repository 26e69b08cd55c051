"""Starting anew in place: the same process becomes the program that is installed now.

The command line is checked first with `--check`, by the new program, so that one that can't start leaves this one
running. Then it waits until the next supervisor would find everything, where a template or a worker was just replaced.
`execute` then replaces the process image (man 2 execve): the pid stays, every descriptor is closed, and the new
supervisor finds the workers relaying, see orphans.py.
"""

import os
import subprocess
import sys
from collections.abc import Callable

from relay.confinement import capabilities
from relay.supervisor.timers import Timers

CHECK_S_MAX = 10.0
KEPT_S_MAX = 10.0  # a template is there in a second, more on a busy machine; clients wait 30 s for both
POLL_S = 0.05


class Restarter:
    """One check at a time."""

    def __init__(self, timers: Timers, obstacle: Callable[[], str | None]) -> None:
        """`obstacle` tells why workers could not be taken over now."""
        self._timers = timers
        self._obstacle = obstacle
        self._check: subprocess.Popen[str] | None = None
        self._is_under_way = False

    def begin(self, agree: Callable[[], None], refuse: Callable[[str], None]) -> None:
        """Check whether the new program starts with this command line, and wait for its turn; call one of the two."""
        if self._is_under_way:
            refuse("a restart is under way")
            return
        self._is_under_way = True
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
            self._await_kept(KEPT_S_MAX, agree, refuse)
        else:
            self._refuse((error.strip().splitlines() or ["no answer"])[-1], refuse)

    def _await_kept(self, left_s: float, agree: Callable[[], None], refuse: Callable[[str], None]) -> None:
        obstacle = self._obstacle()
        if obstacle is None:
            agree()
        elif left_s > 0:
            self._timers.after(POLL_S, lambda: self._await_kept(left_s - POLL_S, agree, refuse))
        else:
            self._refuse(f"{obstacle} after {KEPT_S_MAX:.0f} s: try again", refuse)

    def _refuse(self, reason: str, refuse: Callable[[str], None]) -> None:
        self._is_under_way = False
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
