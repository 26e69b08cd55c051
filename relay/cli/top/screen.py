"""The screen: the loop that waits for keys and for the next sample, and draws."""

import os
import signal
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live

from relay import api
from relay.cli.top.draw import ASCII_BARS, UNICODE_BARS, Screen, layout, lines
from relay.cli.top.segments import instance_of
from relay.cli.top.terminal import Terminal
from relay.cli.top.view import View
from relay.cli.top.watch import Frame, Watch
from relay.client import Client
from relay.errors import ControlError

PIPE_COLUMNS = 200


def find_instance(path: Path) -> str | None:
    """The instance of the relay behind a control socket. Raises RelayError."""
    with Client(path) as client:
        workers = client.ask(api.ListWorkers()).result
    names = [worker.get("stats_segment", "") for worker in workers]
    if not any(names):
        raise ControlError(f"{path}: that relay does not tell where its counters are: restart it as this version")
    return instance_of(names[0])


def _bars(console: Console) -> str:
    return UNICODE_BARS if console.encoding.startswith("utf") else ASCII_BARS


def print_once(path: Path, interval_s: float) -> None:
    """Print one frame, with all rules, from two samples. Raises RelayError."""
    console = Console(highlight=False)
    watch = Watch(path, find_instance(path), lambda: None)
    watch.begin()
    watch.look()
    time.sleep(interval_s)
    frame = watch.look()
    width = console.width if console.is_terminal else PIPE_COLUMNS
    for text in lines(frame, View(), Screen(width, None, _bars(console))):
        text.rstrip()
        console.print(text, no_wrap=True, crop=False, soft_wrap=True)


def run(path: Path, interval_s: float) -> None:
    """Draw until the user quits. Raises RelayError; the terminal is as it was then, too."""
    instance = find_instance(path)
    with Terminal() as terminal:
        watch = Watch(path, instance, terminal.wake)
        watch.begin()
        _Loop(terminal, watch, interval_s).run()


class _Loop:
    """Frames and keys, one after the other."""

    def __init__(self, terminal: Terminal, watch: Watch, interval_s: float) -> None:
        self._terminal = terminal
        self._watch = watch
        self._interval_s = interval_s
        self._console = Console(highlight=False)
        self._view = View()
        self._shown: Frame = watch.look()

    def run(self) -> None:
        """Draw whenever a key or a sample came, until the user quits or a signal ends it."""
        with self._live() as live:
            next_s = time.monotonic() + min(self._interval_s, 0.5)  # rates soon, whatever the interval
            while not (self._view.quitting or self._terminal.ended):
                for key in self._terminal.wait(next_s - time.monotonic()):
                    self._view.press(key)
                if self._terminal.stopping:
                    self._stop(live)
                if time.monotonic() >= next_s:
                    frame = self._watch.look()
                    next_s = max(next_s + self._interval_s, time.monotonic())
                    if not self._view.paused:
                        self._shown = frame
                self._draw(live)

    def _live(self) -> Live:
        return Live(
            console=self._console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )

    def _draw(self, live: Live) -> None:
        width, height = self._console.size
        live.update(layout(self._shown, self._view, Screen(width, height, _bars(self._console))), refresh=True)

    def _stop(self, live: Live) -> None:
        """Ctrl-Z: hand the terminal back until `fg`."""
        live.stop()
        with self._terminal.as_before():
            os.kill(os.getpid(), signal.SIGSTOP)
        live.start()
