"""mcrlog stat: rates of rings that come, go and are made anew, on screens of any size."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from logging_shm import LogEntry, Severity, SharedSPSCRingBuffer
from logging_shm.cli.choose import Rings
from logging_shm.cli.stat import Meter
from tests.logging_shm.command import (
    DEADLINE_S,
    MCRLOG,
    Running,
    mcrlog,
    mcrlog_json,
    ring_of,
    screen_of,
    terminal,
)

ESCAPES = re.compile(r"\033\[[0-9;?]*[A-Za-z]")
QUICK = ("--count", "1", "--interval-s", "0.1")


def write(ring: SharedSPSCRingBuffer, count: int) -> None:
    for number in range(count):
        ring.write(LogEntry(Severity.Info, ring.facility, f"{number}"))


def test_records_and_drops_since_the_last_look_are_rates(instance: str) -> None:
    with ring_of(instance, capacity=8) as ring:
        write(ring, 3)
        meter = Meter(Rings(instance=instance))
        (first,) = meter.look()
        write(ring, 10)
        (second,) = meter.look()
    assert (first.records_per_s, first.drops_per_s, first.written, first.dropped) == (0, 0, 3, 0)
    assert (second.written, second.dropped, second.unread, second.capacity) == (8, 5, 8, 8)
    assert second.records_per_s == pytest.approx(second.drops_per_s)
    assert second.records_per_s > 5 / DEADLINE_S


def test_rings_come_and_go_and_a_name_used_again_begins_anew(instance: str) -> None:
    meter = Meter(Rings(instance=instance))
    former = ring_of(instance)
    write(former, 9)
    assert [row.written for row in meter.look()] == [9]
    former.shutdown()
    assert meter.look() == []
    with ring_of(instance) as ring:
        write(ring, 2)
        assert [(row.written, row.records_per_s) for row in meter.look()] == [(2, 0)]
        ring.shutdown()
        with ring_of(instance) as third:
            write(third, 1)
            assert [(row.written, row.records_per_s) for row in meter.look()] == [(1, 0)]


def test_stat_takes_nothing_from_a_ring_and_prints_whole_lines_into_a_pipe(instance: str) -> None:
    longest = instance.ljust(24, "x")
    with ring_of(longest, "dp_c254_bufferpool") as ring:
        write(ring, 3)
        lines = mcrlog("stat", "--instance", longest, *QUICK).stdout.splitlines()
        assert ring.unread() == 3
    assert lines[0].split() == ["segment", "records/s", "drops/s", "fill", "written", "dropped"]
    assert lines[1].split() == [ring.segment.name, "0", "0", "4%", "3", "0"]


def test_json_is_an_array_for_each_look(instance: str) -> None:
    with ring_of(instance) as ring:
        write(ring, 3)
        (row,) = mcrlog_json("stat", "--instance", instance, *QUICK)
    rates, counts = {"records_per_s": 0, "drops_per_s": 0}, {"unread": 3, "capacity": 64, "written": 3, "dropped": 0}
    assert row == {"segment": ring.segment.name} | rates | counts


@pytest.mark.parametrize("name_length", [0, 24])
def test_a_screen_of_80_by_24_is_never_overrun_and_tells_what_it_leaves_out(instance: str, name_length: int) -> None:
    name = instance.ljust(name_length, "x")
    rings = [ring_of(name, f"dp_c{core + 200}_bufferpool", core=core, capacity=2) for core in range(40)]
    screen = ESCAPES.sub("", screen_of(["stat", "--instance", name, *QUICK]))
    frame = [line.rstrip() for line in screen.replace("\r", "\n").split("\n") if line.strip()]
    for ring in rings:
        ring.shutdown()
    assert max(map(len, frame)) <= 80
    head = [index for index, line in enumerate(frame) if line.startswith("segment")]
    assert len(frame[head[-1] :]) <= 23
    assert frame[-1] == "… and 19 that are quieter"
    assert frame[head[-1]].split()[:4] == ["segment", "records/s", "drops/s", "fill"]
    assert frame[head[-1] + 1].split()[1:4] == ["0", "0", "0%"]


def test_stat_goes_on_when_all_rings_vanish_and_come_again(instance: str, tmp_path: Path) -> None:
    ring = ring_of(instance)
    with Running(tmp_path, "stat", "--json", "--interval-s", "0.1", "--instance", instance) as watching:
        watching.wait_for(f'"{ring.segment.name}"')
        ring.shutdown()
        watching.wait_for("[]\n")
        with ring_of(instance) as again:
            write(again, 7)
            watching.wait_for('"written": 7')
            assert watching.interrupt() == 0
    assert "Traceback" not in watching.text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_a_terminal_gets_its_cursor_back(instance: str, number: signal.Signals, code: int) -> None:
    with ring_of(instance), terminal(80, 24) as (ours, theirs):
        process = subprocess.Popen([*MCRLOG, "stat", "--instance", instance], stdout=theirs, stderr=theirs)
        printed = b""
        while b"records/s" not in printed:
            printed += os.read(ours, 65536)
        process.send_signal(number)
        assert process.wait(DEADLINE_S) == code
        printed += os.read(ours, 65536)
        os.close(theirs)
    assert printed.count(b"\033[?25l") == printed.count(b"\033[?25h") == 1
    assert b"Traceback" not in printed
