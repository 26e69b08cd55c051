"""A host that refuses what a relay needs, or whose clock steps: said in one line at start, or nothing happens at all.

gen ──left── relay ──right── sink        10.1.0.0/24, 10.2.0.0/24
"""

import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest

from tests.system.conftest import StartRelay
from tests.system.harness import BIN, Relay, assert_perfect, receiving, send, wait_until
from tools.netns import Line

PPS = 50_000
COUNT = 100_000
IN, OUT = "239.1.1.1:5001", "239.2.2.2:6001:right"
HOUR_S = 3600
REFUSING = """
import ctypes, os, struct, sys
from relay.confinement import seccomp
from relay.confinement.capabilities import prctl
refuse = (seccomp.RET_K, 0, 0, seccomp.SECCOMP_RET_ERRNO | 1)
program = [(seccomp.LD_WORD_ABS, 0, 0, 0), (seccomp.JEQ_K, 0, 1, 425), refuse,
           (seccomp.RET_K, 0, 0, seccomp.SECCOMP_RET_ALLOW)]
code = ctypes.create_string_buffer(seccomp.encode(program))
fprog = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
prctl(seccomp.PR_SET_SECCOMP, seccomp.SECCOMP_MODE_FILTER, ctypes.addressof(fprog))
os.execv(sys.argv[1], sys.argv[1:])
"""
CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile long *offset_s;
__attribute__((constructor)) static void map(void) {
    int fd = open(getenv("CLOCK_OFFSET"), O_RDONLY | O_CLOEXEC);
    offset_s = mmap(0, 4096, PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
}
int clock_gettime(clockid_t clock, struct timespec *time) {
    int result = syscall(SYS_clock_gettime, clock, time);
    if (result == 0 && clock == CLOCK_REALTIME) time->tv_sec += *offset_s;
    return result;
}
int gettimeofday(struct timeval *time, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    time->tv_sec = now.tv_sec;
    time->tv_usec = now.tv_nsec / 1000;
    return 0;
}
"""


def refused(line: Line, command: list[str], **options: object) -> str:
    """The one line that a start ends with."""
    result = line.hosts[1].run(command, capture_output=True, **options)
    assert result.returncode == 1, result.stdout
    (text,) = result.stderr.splitlines()
    return str(text)


def mcrd(tmp_path: Path) -> list[str]:
    return [str(BIN / "mcrd"), "--interface", "left", "--instance", f"host{os.getpid()}", "--socket", f"{tmp_path}/s"]


def test_io_uring_that_is_switched_off_is_said_and_a_running_relay_goes_on(
    line: Line, start_relay: StartRelay, tmp_path: Path
) -> None:
    gen, _, sink = line.hosts
    relay = start_relay(line.hosts[1], ("left",), 1, "--ring-mib", "64")
    relay.add("r", IN, OUT)
    switch = tmp_path / "io_uring_disabled"
    switch.write_text("2\n")
    script = f"mount --bind {switch} /proc/sys/kernel/io_uring_disabled && exec {' '.join(mcrd(tmp_path))}"
    with receiving(sink, tmp_path, "--interface", "left", "--idle-timeout", "2") as summary:
        to = ("--interface", "right", "--rate", str(PPS), "--count", str(COUNT))
        sending = threading.Thread(target=send, args=(gen, *to))
        sending.start()
        assert "io_uring" in refused(line, ["unshare", "--mount", "sh", "-c", script])
        sending.join()
        assert_perfect(summary(), COUNT)
    relay.stop()


def test_io_uring_that_a_filter_refuses_is_said(line: Line, tmp_path: Path) -> None:
    text = refused(line, [sys.executable, "-c", REFUSING, *mcrd(tmp_path)])
    assert text.startswith("mcrd: io_uring is refused: Operation not permitted")


@pytest.mark.parametrize("limit", ["--nofile=64:64", "--memlock=0:0", "--nproc=1:1"])
def test_low_limits_do_not_matter(line: Line, tmp_path: Path, limit: str) -> None:
    log = tmp_path / "log"
    with log.open("w") as out:
        process = line.hosts[1].popen(["prlimit", limit, *mcrd(tmp_path)], stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: "Data plane worker started" in log.read_text() or process.poll() is not None, "start")
        assert process.poll() is None, log.read_text()
    finally:
        process.terminate()
        assert process.wait(15) == 0, log.read_text()


@pytest.mark.parametrize("redirection", [">&-", "| true"])
def test_without_anybody_at_its_output_the_relay_relays(line: Line, tmp_path: Path, redirection: str) -> None:
    gen, host, sink = line.hosts
    command = mcrd(tmp_path)
    control = [str(BIN / "mcrctl"), "--socket", f"{tmp_path}/s"]
    pid_file = tmp_path / "pid"
    script = f"(echo $BASHPID > {pid_file}; exec {' '.join(command)} 2>/dev/null) {redirection}"
    with host.popen(["bash", "-c", script]) as process:
        try:
            wait_until(lambda: host.run([*control, "ping"], capture_output=True).returncode == 0, "it answers")
            rule = ["add-rule", "--input-group", "239.1.1.1", "--input-port", "5001", "--output", OUT]
            assert host.run([*control, *rule], capture_output=True).returncode == 0
            with receiving(sink, tmp_path, "--interface", "left", "--idle-timeout", "2") as summary:
                send(gen, "--interface", "right", "--rate", "20000", "--count", "20000")
                assert_perfect(summary(), 20_000)
        finally:
            os.kill(int(pid_file.read_text()), 15)
            process.wait(15)
    assert not list(Path("/dev/shm").glob(f"mcr_host{os.getpid()}_*"))


class Clock:
    """A CLOCK_REALTIME for a relay and its children that can be set."""

    def __init__(self, folder: Path) -> None:
        self.offset = folder / "offset"
        self.set(0)
        source, self.library = folder / "clock.c", folder / "clock.so"
        source.write_text(CLOCK)
        subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", str(self.library), str(source)], check=True)

    def set(self, seconds: int) -> None:
        """Step to so many seconds off."""
        with self.offset.open("r+b" if self.offset.exists() else "wb") as file:
            file.write(seconds.to_bytes(8, "little", signed=True).ljust(4096, b"\0"))


def has_lines(relay: Relay, count: int) -> bool:
    return relay.text().count("Stats: in") >= count


def test_a_clock_that_steps_by_an_hour_changes_no_rate_and_no_order(
    line: Line, start_relay: StartRelay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gen, host, sink = line.hosts
    clock = Clock(tmp_path)
    monkeypatch.setenv("LD_PRELOAD", str(clock.library))
    monkeypatch.setenv("CLOCK_OFFSET", str(clock.offset))
    relay = start_relay(host, ("left",), 1, "--ring-mib", "64", "--stats-interval-s", "1")
    monkeypatch.delenv("LD_PRELOAD")
    relay.add("r", IN, OUT)
    with receiving(sink, tmp_path, "--interface", "left", "--idle-timeout", "3") as summary:
        to = ("--interface", "right", "--rate", str(PPS), "--count", str(3 * COUNT))
        sending = threading.Thread(target=send, args=(gen, *to))
        sending.start()
        for number, seconds in enumerate((HOUR_S, -HOUR_S, 0)):
            before = relay.text().count("Stats: in")
            clock.set(seconds)
            relay.add(f"after{number}", f"239.1.7.{number}:5001", "239.2.7.7:6001:right")
            wait_until(partial(has_lines, relay, before + 2), "stats lines go on")
            rate = relay.stats()["packets_per_second"]
            assert PPS / 4 < rate < PPS * 4 or not sending.is_alive()
        sending.join()
        assert_perfect(summary(), 3 * COUNT)
    added = [text for text in relay.text().splitlines() if "Rule after" in text]
    assert [f"after{number}" in text for number, text in enumerate(added)] == [True] * 3
    assert "hangs" not in relay.text()
    relay.stop()
