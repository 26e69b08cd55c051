"""mcrlog tail and dump: what lines show, which are shown, and what happens to rings and readers meanwhile."""

import json
import os
import re
import signal
import subprocess
from functools import partial
from pathlib import Path

import pytest

from logging_shm import Drain, LogEntry, Severity, SharedSPSCRingBuffer
from logging_shm.cli.choose import Rings
from logging_shm.cli.follow import Filter, Follower
from logging_shm.cli.tail import renew
from logging_shm.sinks.url import Described
from tests.logging_shm.command import DEADLINE_S, MCRLOG, Running, mcrlog, mcrlog_here, ring_of, until
from tests.logging_shm.remnants import SHM, in_child

MS = 1_000_000
LINE = re.compile(
    r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z \[Warning\] \[Ingress\] hello core=3 pid=(\d+) tid=(\d+) seq=0 rule="tv"'
)


def write(
    ring: SharedSPSCRingBuffer, message: str, severity: Severity = Severity.Info, at_ns: int | None = None
) -> None:
    assert ring.append(severity, message, timestamp_ns=at_ns)


def texts(output: str) -> list[str]:
    """The messages of lines, without what stands around them."""
    return [re.sub(r"( core=\d+)? pid=.*", "", line.split("] ", 2)[2]) for line in output.splitlines()]


def test_a_line_shows_time_severity_facility_message_core_pid_and_pairs(instance: str) -> None:
    with ring_of(instance, "dp_c3_ingress", core=3) as ring:
        ring.append(Severity.Warning, "hello", (("rule", "tv"),))
        match = LINE.fullmatch(mcrlog_here("tail", "--instance", instance).rstrip("\n"))
        assert match is not None
        assert match[1] == str(os.getpid())


def test_a_json_line_shows_the_same(instance: str) -> None:
    with ring_of(instance, "dp_c3_ingress", core=3) as ring:
        ring.append(Severity.Warning, "hello", (("rule", "tv"),))
        shown = json.loads(mcrlog_here("dump", "--json", "--instance", instance))
    assert {"severity": "Warning", "facility": "Ingress", "message": "hello", "core": 3}.items() <= shown.items()
    assert (shown["pid"], shown["pairs"]) == (os.getpid(), {"rule": "tv"})


def test_tail_shows_the_last_ten_lines_of_all_rings_merged_by_time(instance: str) -> None:
    with ring_of(instance) as first, ring_of(instance, "controlplane") as second:
        for number in range(24):
            write((first, second)[number % 2], f"{number}", at_ns=(number + 1) * MS)
        assert texts(mcrlog_here("tail", "--instance", instance)) == [str(n) for n in range(14, 24)]
        assert texts(mcrlog_here("tail", "-n", "2", "--instance", instance)) == ["22", "23"]
        assert (first.unread(), second.unread()) == (12, 12)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--severity", "warning"], ["worse"]),
        (["--severity", "Notice"], ["worse", "notable"]),
        (["--grep", "^.*(wor|usu)"], ["worse", "usual"]),
        (["--grep", "core=7"], ["usual"]),
        (["--core", "7"], ["usual"]),
        (["--facility", "SUPERVISOR"], ["worse", "notable"]),
        (["--since", "1h"], ["worse", "notable", "usual"]),
        (["--since", "2000-01-01"], ["worse", "notable", "usual"]),
        (["--since", "0001-01-01T00:00:00"], ["worse", "notable", "usual"]),
        (["--since", "9999-12-31T23:59:59"], []),
        (["--since", "2999-01-01T00:00:00+02:00"], []),
        (["--since", "1000000000000d"], ["worse", "notable", "usual"]),
        (["--severity", "warning", "--grep", "usual"], []),
    ],
)
def test_filters_choose_lines(instance: str, options: list[str], expected: list[str]) -> None:
    with ring_of(instance) as ring, ring_of(instance, "dp_c7_egress", core=7) as other:
        write(ring, "worse", Severity.Error)
        write(ring, "notable", Severity.Notice)
        write(other, "usual")
        assert texts(mcrlog_here("tail", "--instance", instance, *options)) == expected


def test_since_shows_all_lines_that_are_younger(instance: str) -> None:
    import time

    with ring_of(instance) as ring:
        now_ns = time.monotonic_ns()
        for seconds in range(60, 0, -1):
            write(ring, f"{seconds}", at_ns=now_ns - seconds * 1000 * MS)
        shown = texts(mcrlog_here("tail", "--since", "30.5s", "--instance", instance))
    assert shown == [str(n) for n in range(int(shown[0]), 0, -1)]
    assert 10 < int(shown[0]) <= 30


def test_dump_shows_the_last_records_of_each_ring_those_read_by_the_drain_too(instance: str) -> None:
    with ring_of(instance, capacity=8) as ring, ring_of(instance, "controlplane") as other:
        for number in range(6):
            write(ring, f"{number}", at_ns=(number + 1) * MS)
            ring.read()
        write(other, "between", at_ns=5 * MS - 1)
        assert texts(mcrlog_here("dump", "--instance", instance)) == ["0", "1", "2", "3", "between", "4", "5"]
        assert texts(mcrlog_here("dump", "--last", "1", "--instance", instance)) == ["between", "5"]
        assert texts(mcrlog_here("dump", f"/dev/shm/{other.segment.name}")) == ["between"]


def test_dump_shows_the_last_words_of_a_killed_process(instance: str) -> None:
    def write_and_die() -> None:
        ring = ring_of(instance)
        for number in range(100):
            ring.append(Severity.Info, f"{number}")
            ring.read()
        os.kill(os.getpid(), signal.SIGKILL)

    in_child(write_and_die)
    assert texts(mcrlog("dump", "--instance", instance).stdout) == [str(n) for n in range(100 - 64, 100)]


def shows_what_is_written_now(follower: Running, ring: SharedSPSCRingBuffer) -> bool:
    write(ring, "begin")
    return "begin" in follower.text()


def test_followers_see_every_line_and_the_drain_loses_none(instance: str, tmp_path: Path) -> None:
    log, count = tmp_path / "log", 2000
    expected = [f"number {number}" for number in range(count)]
    with ring_of(instance, capacity=4096) as ring:
        drain = Drain([Described(f"file:{log}").open()])
        drain.add([ring])
        drain.start()
        options = ("tail", "-f", "-n", "0", "--instance", instance, "--grep", "number|begin")
        with Running(tmp_path, *options) as first, Running(tmp_path, *options, "--json") as second:
            for follower in (first, second):
                until(partial(shows_what_is_written_now, follower, ring), follower.text)
            for message in expected:
                write(ring, message)
            first.wait_for(expected[-1] + " ")
            second.wait_for(expected[-1] + '"')
            assert [text for text in texts(first.text()) if text != "begin"] == expected
            shown = [json.loads(line)["message"] for line in second.text().splitlines()]
            assert [text for text in shown if text != "begin"] == expected
        drain.stop()
        assert [line for line in log.read_text().splitlines() if "begin" not in line] == [
            f"[Info] [Supervisor] {message}" for message in expected
        ]
        assert sum(ring.segment.dropped()) == 0


def test_ctrl_c_ends_a_follower_without_a_word(instance: str, tmp_path: Path) -> None:
    with ring_of(instance) as ring, Running(tmp_path, "tail", "-f", "--instance", instance) as follower:
        write(ring, "seen")
        follower.wait_for("seen")
        assert follower.interrupt() == 0
        assert len(follower.text().splitlines()) == 1


def test_a_follower_that_starts_first_shows_a_ring_that_comes(instance: str, tmp_path: Path) -> None:
    with ring_of(f"{instance}b") as other, Running(tmp_path, "tail", "-f", other.segment.name) as ready:
        write(other, "ready")
        ready.wait_for("ready")
        with Running(tmp_path, "tail", "-f", "--instance", instance) as follower, ring_of(instance) as ring:
            write(ring, "first words")
            follower.wait_for("first words")


def test_what_was_written_just_before_a_ring_went_is_shown_before_it_is_forgotten(instance: str) -> None:
    former = ring_of(instance)
    chosen, known = Rings(instance=instance), {former.segment.name: former}
    follower = Follower([former], Filter(), last=10)
    write(former, "last words")
    former.shutdown()
    with ring_of(instance) as ring:
        write(ring, "first words")
        assert texts("".join(renew(follower, chosen, known))) == ["last words"]
        assert texts("".join(follower.present())) == ["first words"]
        assert known[ring.segment.name].segment.identity == ring.segment.identity


@pytest.mark.parametrize("named", [False, True], ids=["by instance", "by segment"])
def test_a_follower_shows_the_last_lines_of_a_ring_and_goes_on_with_the_next_of_its_name(
    instance: str, tmp_path: Path, named: bool
) -> None:
    former = ring_of(instance)
    chosen = [former.segment.name] if named else ["--instance", instance]
    with Running(tmp_path, "tail", "-f", *chosen) as follower:
        write(former, "begun")
        follower.wait_for("begun")
        follower.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, follower.process.pid, os.WSTOPPED)
        write(former, "last words")
        former.shutdown()
        with ring_of(instance) as ring:
            write(ring, "first words")
            follower.process.send_signal(signal.SIGCONT)
            follower.wait_for("last words", "first words")
            write(ring, "further words")
            follower.wait_for("further words")
    assert texts(follower.text()) == ["begun", "last words", "first words", "further words"]


def test_a_follower_ends_when_nobody_reads_it_although_nothing_is_written(instance: str) -> None:
    with ring_of(instance) as ring:
        write(ring, "seen")
        command = [*MCRLOG, "tail", "-f", "--instance", instance]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stderr is not None
        assert "seen" in process.stdout.readline()
        process.stdout.close()
        assert process.wait(DEADLINE_S) == 1
        assert process.stderr.read() == ""
        process.stderr.close()


def test_a_closed_pipe_ends_dump_without_a_word(instance: str) -> None:
    with ring_of(instance, capacity=4096) as ring:
        for number in range(4096):  # more than a pipe holds
            write(ring, f"{number}")
        shell = f"{' '.join(MCRLOG)} dump --last 4096 --instance {instance} | head -1"
        result = subprocess.run(shell, shell=True, capture_output=True, text=True, check=True, timeout=DEADLINE_S)
    assert texts(result.stdout) == ["0"]
    assert result.stderr == ""


def test_no_byte_in_a_ring_reaches_the_terminal_as_it_is(instance: str) -> None:
    with ring_of(instance) as ring:
        ring.write(LogEntry(Severity.Info, ring.facility, "\033[2Jgone\n[Error] forged", pairs=(("a\r", "\033"),)))
        output = mcrlog_here("tail", "--instance", instance)
    assert len(output.splitlines()) == 1
    assert output.rstrip("\n").isprintable()


def test_a_ring_that_can_not_be_read_does_not_keep_others_from_being_shown(instance: str) -> None:
    (SHM / f"mcr_{instance}_controlplane").write_bytes(b"no ring")
    with ring_of(instance) as ring:
        write(ring, "shown")
        for command in ("tail", "dump"):
            result = mcrlog(command, "--instance", instance)
            assert (result.returncode, texts(result.stdout)) == (0, ["shown"])
            assert result.stderr.startswith(f"mcrlog: not shown: /dev/shm/mcr_{instance}_controlplane ")
