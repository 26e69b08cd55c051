"""A segment whose owner cuts it short, and lets it grow again, while a drain reads it beside a sound one.

python -m tests.fuzz.truncating --instance NAME --log FILE --progress FILE
"""

import argparse
import os
import random
import time
from pathlib import Path

from logging_shm import Drain, Facility, Severity, SharedSPSCRingBuffer
from logging_shm.cli.follow import Filter, Follower
from logging_shm.sinks.file import FileSink
from logging_shm.sinks.selection import Selection
from logging_shm.truncation import survive_truncation
from tests.fuzz.children import Progress
from tests.logging_shm.command import ring_of

CAPACITY = 1024
RECORDS = 10_000
POLL_S = 0.001


def main() -> None:
    """As the module says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--instance", required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--progress", type=Path, required=True)
    options = parser.parse_args()
    progress, dice = Progress(options.progress), random.Random(1)
    survive_truncation()
    drain = Drain([FileSink(options.log, selection=Selection(facilities=frozenset({Facility.Supervisor})))])
    hostile = ring_of(options.instance, "dp_c0_ingress", capacity=CAPACITY)
    with hostile, ring_of(options.instance, capacity=CAPACITY) as sound:
        file = f"/dev/shm/{hostile.segment.name}"
        size = hostile.segment.size
        drain.add([hostile, sound])
        drain.start()
        for number in range(RECORDS):
            progress.tell(number)
            if number % 50 == 0:
                os.truncate(file, dice.choice((0, 100, 4096, 8192, size // 2, size - 1, size, 2 * size)))
                hostile.append(Severity.Info, "on a page that may be missing")
                watch(hostile)
            while sound.unread() >= CAPACITY // 2:
                time.sleep(POLL_S)
            assert sound.append(Severity.Info, f"{number}")
        drain.stop()


def watch(ring: SharedSPSCRingBuffer) -> None:
    """As Python reads, and mcrlog."""
    ring.last(10)
    ring.unread()
    list(Follower([ring], Filter(), last=10).present())


if __name__ == "__main__":
    main()
