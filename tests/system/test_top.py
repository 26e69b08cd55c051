"""`mcrctl top` on a terminal: tmux is the terminal, the relay and its traffic are real.

gen ──left── relay ──right── sink        10.1.0.0/24, 10.2.0.0/24
"""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.system.harness import BIN, PYTHON, Relay, wait_until
from tests.system.test_stream_health import RTP, Sender, broken, rtp
from tools.environment import CHECKOUT
from tools.netns import Host, Line

RATE_PPS = 1000
LONG_ID = "z" * 64
STRANGER_UID = 65_533


class Terminal:
    """A terminal in which a shell runs a command; the shell then tells its status and waits."""

    def __init__(self, folder: Path, command: list[str], columns: int, rows: int) -> None:
        self._server = folder / "tmux"
        self.attributes = (folder / "before", folder / "after")
        before, after = (shlex.quote(str(path)) for path in self.attributes)
        script = f"stty -g > {before}; {shlex.join(command)}; echo status $?; stty -g > {after}; sleep 3600"
        self._tmux("-f", "/dev/null", "new-session", "-d", "-x", str(columns), "-y", str(rows), "sh", "-c", script)

    def _tmux(self, *arguments: str) -> str:
        command = ["tmux", "-u", "-S", str(self._server), *arguments]
        environment = {**os.environ, "LC_ALL": "C.UTF-8"}
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    def press(self, *keys: str) -> None:
        """Press keys by tmux's names for them."""
        self._tmux("send-keys", *keys)

    def type(self, text: str) -> None:
        """Type a text."""
        self._tmux("send-keys", "-l", text)

    def lines(self) -> list[str]:
        """What is seen; no line is the continuation of another."""
        seen = self._tmux("capture-pane", "-p").splitlines()
        assert len(self._tmux("capture-pane", "-p", "-J").splitlines()) == len(seen), "a line wraps"
        return seen

    def wait_for(self, pattern: str) -> str:
        """Wait until a line matches; return it."""

        def found() -> str | None:
            return next((line for line in self.lines() if re.search(pattern, line)), None)

        try:
            return str(wait_until(found, f"a line with {pattern!r}"))
        except AssertionError:
            print("\n".join(self.lines()))
            raise

    def rules(self) -> list[list[str]]:
        """The rows of the rules' table, in words."""
        seen = self.lines()
        head = next(i for i, line in enumerate(seen) if line.startswith("rule"))
        end = next((i for i, line in enumerate(seen) if line.startswith("─ log")), len(seen))
        return [line.split() for line in seen[head + 1 : end] if line.strip()]

    def tell(self, name: str) -> str:
        """One of tmux's own variables."""
        return self._tmux("display-message", "-p", f"#{{{name}}}").strip()

    def close(self) -> None:
        """End the terminal and all that runs in it."""
        self._tmux("kill-server")


@contextlib.contextmanager
def watching(relay: Relay, folder: Path, columns: int = 80, rows: int = 24) -> Iterator[Terminal]:
    """`mcrctl top` in a terminal of its own."""
    place = folder / f"terminal-{len(list(folder.iterdir()))}"
    place.mkdir()
    command = relay.host.command([str(BIN / "mcrctl"), "--socket", str(relay.socket), "top", "--interval", "0.2"])
    terminal = Terminal(place, command, columns, rows)
    try:
        yield terminal
    finally:
        terminal.close()


@contextlib.contextmanager
def traffic(gen: Host) -> Iterator[None]:
    """Two streams, until the block ends."""
    command = [PYTHON, "tools/send_mcast.py", "--quiet", "--interface", "right", "--duration", "600", "--no-gso"]
    command += ["--rate", str(2 * RATE_PPS), "--flows", "2", "--flow-by", "group"]
    process = gen.popen(command, cwd=CHECKOUT)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def send_damaged(gen: Host) -> None:
    """RTP to the rule tv besides, of which 3 are lost."""
    with Sender(gen, RTP) as sender:
        sender.send(*(rtp(i) for i in range(10)), *broken(10, 100), pace_s=0.0005)


@pytest.fixture(scope="module")
def line() -> Iterator[Line]:
    """Hosts for the relay that these tests share: the last of them ends it."""
    with Line("gen", "relay", "sink") as line:
        yield line


@pytest.fixture(scope="module")
def relay(line: Line) -> Iterator[Relay]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o711)  # those of pytest are for root alone, and a stranger connects
        yield from running(Relay(line.hosts[1], folder, ("left",)), folder)


def running(relay: Relay, folder: Path) -> Iterator[Relay]:
    """The relay with its rules, until the tests have ended."""
    try:
        relay.add_many(
            folder,
            [
                ("silent", "239.1.1.9:5001", "239.2.2.9:6001:right"),
                ("tv", "239.1.1.1:5001", "239.2.2.1:6001:right"),
                (LONG_ID, "239.1.1.2:5001", "239.2.2.2:6001:right"),
            ],
        )
        yield relay
    finally:
        relay.kill()


def rate(word: str, unit: str) -> float:
    """A shown rate as a number; `unit` is the word behind it."""
    return float(word) * {"k": 1e3, "M": 1e6, "G": 1e9}.get(unit, 1)


def is_restored(terminal: Terminal) -> bool:
    """Whether the terminal is as it was before."""
    before, after = (path.read_text() for path in terminal.attributes)
    return before == after and terminal.tell("alternate_on") == "0" and terminal.tell("cursor_flag") == "1"


def test_eighty_columns_show_rates_and_obey_keys(line: Line, relay: Relay, tmp_path: Path) -> None:
    relay.ask("log-level", "set", "debug", "--facility", "ControlPlane")
    with traffic(line.hosts[0]), watching(relay, tmp_path) as terminal:
        terminal.wait_for(r"mcr test.*3 rules  in .*/s  out .*/s .*bit/s")

        def is_right() -> bool:
            shown = next((row for row in terminal.rules() if row[0] == "tv"), [])
            return len(shown) > 2 and 0.8 * RATE_PPS < rate(shown[1], shown[2]) < 1.2 * RATE_PPS

        terminal.wait_for(r"^tv +\d.* <1 s .*[▁-█]")
        wait_until(is_right, "the rate of tv is what is sent")
        assert terminal.rules()[-1][0] == "silent"
        terminal.wait_for(r"^silent .* never")

        terminal.press("n")
        wait_until(lambda: [row[0][0] for row in terminal.rules()] == ["s", "t", "z"], "sorted by name")
        terminal.press("r")
        wait_until(lambda: [row[0][0] for row in terminal.rules()] == ["z", "t", "s"], "turned round")

        terminal.press("/")
        terminal.type("239.1.1.9 SIL")
        wait_until(lambda: [row[0] for row in terminal.rules()] == ["silent"], "filtered while typing")
        terminal.press("Enter")
        terminal.wait_for(r"filter: 239.1.1.9 SIL .* 1-1 of 1$")
        terminal.press("Escape")
        wait_until(lambda: len(terminal.rules()) == 3, "the filter is dropped")

        terminal.press("p")
        terminal.wait_for("^PAUSED")
        held = terminal.lines()
        sent = relay.stats()["packets_in"]
        wait_until(lambda: relay.stats()["packets_in"] > sent + RATE_PPS, "two frames would have come")
        assert terminal.lines() == held
        terminal.press("p")
        wait_until(lambda: terminal.lines()[0] != held[0], "it goes on")
        assert relay.text().count("Received command list-rules") == 1, "asked again, and nothing had changed"

        former = relay.ask("list-workers")[0]["pid"]
        psutil.Process(former).kill()
        terminal.wait_for(rf"the worker on core \d+ was replaced: process {former}, now \d+")

        terminal.wait_for(r"^tv .* <1 s  +[▁-█]")  # neither loss nor jitter: it is no RTP
        terminal.wait_for(r"^ +\d+ +\d+ .*\d % (<50|≥\d+) +\d+ +[\d.]+ [µm]s +[\d.]+ [µm]s$")
        send_damaged(line.hosts[0])
        terminal.wait_for(r"^tv .* <1 s +3 +[▁-█]")
        terminal.press("l")
        wait_until(lambda: terminal.rules()[0][0] == "tv", "sorted by loss")

        terminal.press("q")
        terminal.wait_for("^status 0")
        wait_until(lambda: is_restored(terminal), "the terminal is as before")


def test_one_frame_for_a_pipe_and_one_line_for_who_may_not_look(relay: Relay) -> None:
    once = relay.control("top", "--once", "--interval", "0.1")
    assert once.returncode == 0, once.stderr
    shown = once.stdout.splitlines()
    assert max(map(len, shown)) <= 200
    assert {"silent", "tv", "z" * 39 + "…"} <= {words[0] for words in map(str.split, shown) if words}
    piped = relay.control("top")
    assert (piped.returncode, piped.stderr) == (1, "mcrctl: top needs a terminal: give --once to print one frame\n")
    stranger = ["setpriv", f"--reuid={STRANGER_UID}", f"--regid={STRANGER_UID}", "--clear-groups"]
    command = [*stranger, str(BIN / "mcrctl"), "--socket", str(relay.socket), "top", "--once"]
    # Set in this process by imports: as an inherited one it means a directory for the stranger to write to.
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    refused = relay.host.run(command, capture_output=True, env=environment)
    assert refused.returncode == 1
    segment = f"/dev/shm/mcr_{relay.instance}_dp_c{Relay.cores(1)[0]}_stats"
    remedy = "who alone may read them: run as root, or as that user"
    assert refused.stderr == f"mcrctl: the relay's counters in {segment} belong to nobody, {remedy}\n"


def test_a_screen_outlives_the_relay_and_leaves_the_terminal_in_order(line: Line, relay: Relay, tmp_path: Path) -> None:
    with traffic(line.hosts[0]), watching(relay, tmp_path, columns=200, rows=50) as terminal:
        terminal.wait_for(r"^tv +239.1.1.1:5001 +239.2.2.1:6001:right .* <1 s .*[▁-█]")
        assert any("Z [Info] [" in line for line in terminal.lines())  # whose line is last depends on who asked what
        send_damaged(line.hosts[0])
        terminal.wait_for(r"^tv .* <1 s +3 +[\d.]+ [µm]s +[▁-█]")
        relay.stop()
        terminal.wait_for("the relay has ended; waiting for it to come back")
        relay.start_again()
        relay.add("news", "239.1.1.1:5001", "239.2.2.1:6001:right")
        terminal.wait_for(r"^news +239.1.1.1:5001 .* <1 s .*[▁-█]")
        terminal.wait_for("the relay has started anew")
        assert [row[0] for row in terminal.rules()] == ["news"]
        relay.kill_family()
        terminal.wait_for("the relay was killed")
        for path in Path("/dev/shm").glob(f"mcr_{relay.instance}_*"):
            os.truncate(path, 0)  # an access beyond the end of a mapped file is a SIGBUS
        held = terminal.lines()
        wait_until(lambda: terminal.lines()[0] != held[0], "it goes on")
        for path in Path("/dev/shm").glob(f"mcr_{relay.instance}_*"):
            path.unlink()
        terminal.wait_for("the relay has ended")
        watcher = next(
            process
            for process in psutil.process_iter(["cmdline"])
            if str(relay.socket) in (process.info["cmdline"] or ()) and "top" in process.info["cmdline"]
        )
        watcher.send_signal(signal.SIGTERM)
        terminal.wait_for("^status 0")
        wait_until(lambda: is_restored(terminal), "the terminal is as before")
