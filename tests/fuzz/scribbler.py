"""A worker that was taken over: it writes any numbers into a segment, as fast as it can, until it is killed.

    python -m tests.fuzz.scribbler FILE --first 28 [--spared 64 128] [--runaway WRITE READ AHEAD]

With --runaway it only moves a writer's cursor (at offset WRITE) on before a reader's (at READ), always by AHEAD.
"""

import argparse
import contextlib
import mmap
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from logging_shm.atomics import int64, load_acquire_i64, load_i64, store_i64
from logging_shm.jit import compiled

HOT_BYTES = 1024  # at the beginning, where cursors and counters lie: every second write goes there


@compiled
def scribble(memory: Any, first: int, spared: int, spared_end: int, rounds: int, state: int) -> int:
    """Write `rounds` numbers from offset `first` on, none into the spared bytes; return the state of the dice."""
    base = int64(memory.ctypes.data)
    for _ in range(rounds):
        state = int64(state) * int64(6364136223846793005) + int64(1442695040888963407)
        size = int64(len(memory)) if state & (1 << 40) else int64(HOT_BYTES)
        at = first + ((state >> 20) & 0x7FFFFFFF) % (size - first - 8)
        if at + 8 > spared and at < spared_end:
            continue
        value = state ^ (state << 17)
        kind = (state >> 33) & 7
        if kind == 0:
            value = int64(-1) << ((state >> 50) & 63)
        elif kind == 1:
            value = (int64(1) << ((state >> 50) & 63)) - 1
        elif kind == 2:
            value = load_i64(base + at) + ((state >> 45) & 15) - 7
        store_i64(base + at, value)
    return state


@compiled
def run_away(memory: Any, write: int, read: int, ahead: int, rounds: int) -> None:
    """Move the writer's cursor on."""
    base = int64(memory.ctypes.data)
    for _ in range(rounds):
        store_i64(base + write, load_acquire_i64(base + read) + ahead)


def main() -> None:
    """As the module says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--spared", type=int, nargs=2, default=(0, 0))
    parser.add_argument("--runaway", type=int, nargs=3)
    options = parser.parse_args()
    with options.file.open("r+b") as file:
        memory = np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)
    state, is_told = 1, False
    while True:
        if options.runaway:
            run_away(memory, *options.runaway, 1 << 16)
        else:
            state = scribble(memory, options.first, *options.spared, 1 << 16, state)
        if not is_told:
            print("scribbling", flush=True)
            is_told = True


@contextlib.contextmanager
def scribbling(file: Path, *options: str) -> Iterator[None]:
    """In the block another process scribbles."""
    command = [sys.executable, "-m", "tests.fuzz.scribbler", str(file), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "scribbling\n"
        yield
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


if __name__ == "__main__":
    main()
