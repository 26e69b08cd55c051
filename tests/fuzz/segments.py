"""Every reader of a log segment, on segments that a writer which was taken over has spoilt.

    python -m tests.fuzz.segments --instance NAME --seed 1 --segments 20000 --progress FILE

A sound segment is spoilt anew each time: fields of its header, rate limits, formats, records, or any bytes, with
numbers at the limits of their types. Then all that reads one, reads it: a drain that has mapped it since it was sound,
one that maps it now, the Python side, and what mcrlog's commands do. Nothing may be raised but SegmentError, every line
must be one of printable characters, JSON must be JSON, and a sound ring that is read beside it loses nothing.
"""

import argparse
import json
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from logging_shm import Facility, LogEntry, Severity, SharedSPSCRingBuffer
from logging_shm.cli.choose import Rings
from logging_shm.cli.clean import clean
from logging_shm.cli.follow import Filter, Follower
from logging_shm.cli.list_rings import describe
from logging_shm.cli.stat import Meter
from logging_shm.compiled import write_event_about
from logging_shm.layout import (
    FORMAT_BYTES_MAX,
    FORMATS_MAX,
    FORMATS_OFFSET,
    HEADER,
    LIMIT,
    PAIR,
    RECORD,
    RECORD_BYTES,
    RECORDS_OFFSET,
    Layout,
    pair_key,
)
from logging_shm.lines import Batch
from logging_shm.reader import BATCH_RECORDS, REPORTS_MAX, Reader
from logging_shm.segment import SegmentError
from logging_shm.sinks.base import Formatter, messages
from logging_shm.sinks.selection import Selection
from tests.fuzz.children import Progress, resident_bytes

CAPACITY = 16
SOUND_RECORDS = 3  # written to the sound ring for each spoilt segment
SETTLED = 500  # segments, after which memory must not grow any more
GROWTH_BYTES_MAX = 64 << 20
CPU_S_MAX = 10.0  # for one segment: the work is bounded by the ring's capacity
READS_MAX = 8  # of a batch each, until a ring of 16 records is empty
FORMATS = {1: "First of {rule} from {0:ip}:{1:port}", 2: "{0:d} {1:x} {2:f}", 3: "took {0:ns}", 31: "{a}" * 42}
TEXTS = (b"{a}" * 42, b"{0:d}" * 25, b"{", b"}", b"{}" * 60, b"{0:ip}{9:x}{9999999:d}", b"\xff\0{0}", b"{0:z}\x1b[2J\n")
CHECKED = ("magic", "abi_version", "record_bytes", "capacity", "facility", "core")
SHAPES = {
    "text": re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z \[[A-Z][a-z]+\] \[[A-Z][A-Za-z]+\] .*\n"),
    "syslog": re.compile(r"<\d{1,3}>1 \d{4}-\S+Z \S+ mcr \d+ [A-Z]\w+ \[mcr@32473 tid=.*\] .*"),
}
JOURNAL_KEYS = ("MESSAGE", "PRIORITY", "SYSLOG_IDENTIFIER", "MCR_FACILITY")
Spoil = Callable[[random.Random, Any], None]


def limit_number(dice: random.Random, size: int) -> bytes:
    """A number of `size` bytes near a limit, a power of two, or zero; or any."""
    bits = 8 * size
    kind = dice.randrange(4)
    if kind == 0:
        return dice.randbytes(size)
    near = dice.choice((0, 1 << (bits - 1), 1 << bits, 1 << dice.randrange(bits), CAPACITY, BATCH_RECORDS))
    return ((near + dice.randrange(-2, 3)) % (1 << bits)).to_bytes(size, "little")


def _put(memory: Any, at: int, value: bytes) -> None:
    memory[at : at + len(value)] = value


def _field(dice: random.Random, memory: Any, layout: Layout, base: int, name: str) -> None:
    field = layout.fields[name]
    size = field.bytes // field.count
    _put(memory, base + field.offset + dice.randrange(field.count) * size, limit_number(dice, size))


def _identity(dice: random.Random, memory: Any) -> None:
    """What is checked when a segment is attached."""
    _field(dice, memory, HEADER, 0, dice.choice(CHECKED))


def _header(dice: random.Random, memory: Any) -> None:
    names = [name for name, field in HEADER.fields.items() if field.offset >= HEADER["core"]]
    _field(dice, memory, HEADER, 0, dice.choice(names))


def _cursor(dice: random.Random, memory: Any) -> None:
    name = dice.choice(("write_cursor", "read_cursor"))
    former = HEADER.get(memory, name)
    if dice.randrange(2):
        value = (former + dice.randrange(-2 * CAPACITY, 2 * CAPACITY)) % (1 << 64)
        _put(memory, HEADER[name], value.to_bytes(8, "little"))
    else:
        _field(dice, memory, HEADER, 0, name)


def _limit(dice: random.Random, memory: Any) -> None:
    base = HEADER["limits"] + dice.randrange(FORMATS_MAX) * LIMIT.bytes
    _field(dice, memory, LIMIT, base, dice.choice(tuple(LIMIT.fields)))


def _format(dice: random.Random, memory: Any) -> None:
    text = dice.choice(TEXTS)
    raw = text if dice.randrange(2) else dice.randbytes(dice.randrange(FORMAT_BYTES_MAX + 1))
    at = FORMATS_OFFSET + dice.randrange(FORMATS_MAX) * FORMAT_BYTES_MAX
    _put(memory, at, raw[:FORMAT_BYTES_MAX])
    _field(dice, memory, HEADER, 0, "formats_registered")


def _record(dice: random.Random, memory: Any) -> None:
    base = RECORDS_OFFSET + dice.randrange(CAPACITY) * RECORD_BYTES
    if dice.randrange(4) == 0:
        base += RECORD["pairs"] + dice.randrange(2) * PAIR.bytes
        _field(dice, memory, PAIR, base, dice.choice(tuple(PAIR.fields)))
    else:
        _field(dice, memory, RECORD, base, dice.choice(tuple(RECORD.fields)))


def _message(dice: random.Random, memory: Any) -> None:
    """Any bytes in a message, as long as it may be, so that they are shown."""
    base = RECORDS_OFFSET + dice.randrange(CAPACITY) * RECORD_BYTES
    _put(memory, base + RECORD["message_length"], bytes([dice.randrange(256), dice.randrange(4)]))
    _put(memory, base + RECORD["message"], dice.randbytes(RECORD_BYTES - RECORD["message"]))


def _anything(dice: random.Random, memory: Any) -> None:
    size = dice.choice((1, 8, 256, 4096))
    at = dice.randrange(HEADER["core"], len(memory) - size)
    _put(memory, at, dice.randbytes(size))


def _everything(dice: random.Random, memory: Any) -> None:
    at = HEADER["core"]
    _put(memory, at, dice.randbytes(len(memory) - at))


WAYS: tuple[Spoil, ...] = (_identity, _header, _cursor, _limit, _format, _record, _message, _anything, _everything)
WEIGHTS = (1, 6, 8, 4, 4, 10, 6, 4, 1)


def spoil(dice: random.Random, memory: Any) -> None:
    """Spoil a segment in one to eight ways."""
    for way in dice.choices(WAYS, WEIGHTS, k=dice.randint(1, 8)):
        way(dice, memory)


class Checker:
    """What a batch looks like in every format."""

    def __init__(self) -> None:
        chosen = Selection(timestamps=True, fields=True)
        self._formatters = {kind: Formatter(kind, chosen) for kind in ("text", "json", "syslog", "journal")}

    def lines(self, batch: Batch, kind: str) -> list[str]:
        """The batch's lines; raises AssertionError for one that is none."""
        assert len(batch.records) <= BATCH_RECORDS + REPORTS_MAX
        lines = [line.decode() for chunk in self._formatters[kind].chunks(batch) for line in messages(chunk)]
        assert len(lines) == len(batch.records)
        for line in lines:
            self._check(line, kind)
        return lines

    @staticmethod
    def _check(line: str, kind: str) -> None:
        if kind == "journal":
            assert line.endswith("\n"), line
            fields = line[:-1].split("\n")
            assert all(field.isprintable() for field in fields), line
            keys = [re.fullmatch(r"([A-Z_][A-Z0-9_]*)=.*", field) for field in fields]
            assert all(keys), line
            assert tuple(key[1] for key in keys if key)[:4] == JOURNAL_KEYS, line
            assert sum(field.startswith("MESSAGE=") for field in fields) == 1, line
            return
        assert line.removesuffix("\n").isprintable(), line
        if kind == "json":
            assert {"time", "severity", "facility", "message", "pairs"} <= json.loads(line).keys(), line
        else:
            assert SHAPES[kind].fullmatch(line), line


class Fuzzer:
    """One segment that is spoilt again and again, a sound one, and those who read both."""

    def __init__(self, instance: str, seed: int) -> None:
        self.instance = instance
        self._dice = random.Random(seed)
        self._checker = Checker()
        self.hostile = SharedSPSCRingBuffer.create(
            f"mcr_{instance}_dp_c0_ingress", CAPACITY, Facility.Ingress, core=0, formats=FORMATS, instance=instance
        )
        self.sound = SharedSPSCRingBuffer.create(f"mcr_{instance}_supervisor", CAPACITY, Facility.Supervisor)
        self._written = 0
        self._fill()
        self._bytes = self.hostile.segment.bytes
        self._image = self._bytes.copy()
        self._numbers = np.ndarray(
            CAPACITY, np.int64, self._image, RECORDS_OFFSET + RECORD["sequence"], (RECORD_BYTES,)
        )
        self._reader = Reader()  # it has known both since they were sound
        self._reader.add([self.hostile, self.sound])

    def _fill(self) -> None:
        """Records of every kind, the ring being full."""
        for number in range(CAPACITY // 2):
            pairs = (("rule", "tv"),)
            self.hostile.write(LogEntry(Severity(number % 8), Facility.Ingress, f"text {number}", pairs=pairs))
            key = self.hostile.segment.bytes[:4]
            kind = (1, 2, 3, 31, 9)[number % 5]
            write_event_about(self.hostile.segment.bytes, 6, kind, 0, (number, 5000), pair_key("rule"), key, 4)

    def _go_on(self, number: int) -> None:
        """The segment as if nobody had spoilt it and its writer had written it full once more."""
        first = number * CAPACITY
        self._numbers[:] = np.arange(first, first + CAPACITY)
        HEADER.set(self._image, "read_cursor", first)
        HEADER.set(self._image, "write_cursor", first + CAPACITY)
        self._bytes[:] = self._image

    def close(self) -> None:
        """Remove both."""
        self.hostile.shutdown()
        self.sound.shutdown()

    def step(self, number: int) -> None:
        """Spoil the segment, and have it read."""
        self._go_on(number)
        spoil(self._dice, self.hostile.segment.memory)
        expected = []
        for _ in range(SOUND_RECORDS):
            self._written += 1
            expected.append(f"sound {self._written}")
            assert self.sound.append(Severity.Info, expected[-1])
        kind = ("text", "json", "syslog", "journal")[number % 4]
        found = [line for batch in self._batches(self._reader) for line in self._checker.lines(batch, kind)]
        shown = [match[0] for line in found if "upervisor" in line and (match := re.search(r"sound \d+", line))]
        assert shown == expected, (shown, expected)
        self._read_anew(number)

    @staticmethod
    def _batches(reader: Reader) -> Iterator[Batch]:
        for _ in range(READS_MAX):
            batch = reader.read(everything=True)
            yield batch
            if not len(batch.records):
                return

    def _read_anew(self, number: int) -> None:
        """As those do who come to the segment when it is spoilt already."""
        name = self.hostile.segment.name
        try:
            ring = SharedSPSCRingBuffer.attach(name)
        except SegmentError:
            if number % 64 == 0:
                self._clean()
            return
        assert json.dumps(describe(ring))
        assert ring.segment.instance.isprintable()
        turn = number % 4
        if turn == 0:
            for _ in range(2 * CAPACITY):
                entry = ring.read()
                if entry is None:
                    break
                assert entry.message.isprintable()
        elif turn == 1:
            assert all(entry.message.isprintable() for entry in ring.last(CAPACITY))
        elif turn == 2:
            follower = Follower([ring], Filter(as_json=bool(number & 8)), last=10)
            assert all(line[:-1].isprintable() for line in follower.present())
        else:
            reader = Reader(consume=bool(number & 8))
            reader.add([ring], None if number & 16 else 10)
            for batch in self._batches(reader):
                self._checker.lines(batch, "text")
        if number % 16 == 0:
            (row,) = Meter(Rings([name])).look()
            assert json.dumps(vars(row))
            assert row.cells()
        if number % 64 == 0:
            self._clean()
        ring.segment.finish_dead()

    def _clean(self) -> None:
        outcome = clean(self.instance, dry_run=True)
        told = f"{outcome.removed} {outcome.kept} {outcome.left_alone}"
        assert self.hostile.segment.name in told


def run(fuzzer: Fuzzer, count: int, seconds: float, progress: Progress) -> tuple[int, int]:
    """Spoil at least `count` segments, or for some seconds; return how many, and by how much memory grew."""
    settled_bytes = slowest_s = 0.0
    number = 0
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s if seconds else number < count:
        progress.tell(number + 1)
        began_s = time.process_time()
        fuzzer.step(number)
        slowest_s = max(slowest_s, time.process_time() - began_s)
        number += 1
        if number == SETTLED:
            settled_bytes = resident_bytes()
    assert slowest_s < CPU_S_MAX, f"a segment kept its readers busy for {slowest_s:.1f} s"
    growth_bytes = resident_bytes() - int(settled_bytes) if settled_bytes else 0
    assert growth_bytes < GROWTH_BYTES_MAX, f"memory grew by {growth_bytes >> 20} MiB"
    return number, growth_bytes


def main() -> int:
    """As the module says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--instance", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--segments", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--progress", type=Path, required=True)
    options = parser.parse_args()
    fuzzer = Fuzzer(options.instance, options.seed)
    progress = Progress(options.progress)
    began_s = time.monotonic()
    done, growth_bytes = run(fuzzer, options.segments, options.seconds, progress)
    fuzzer.close()  # not when it failed: the segment is what is wanted then
    print(f"{done} segments in {time.monotonic() - began_s:.1f} s, memory grew by {growth_bytes >> 10} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
