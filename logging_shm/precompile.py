"""Fill the cache with the reader's compiled code: `python -m logging_shm.precompile`, run by `make setup`."""

import os
import shutil
from pathlib import Path

import numpy as np

from logging_shm.append import printable_table
from logging_shm.collect import SOURCE, collect
from logging_shm.layout import RECORD_BYTES
from logging_shm.lines import FORMATTERS, Batch, Formats
from logging_shm.sinks.base import Formatter
from logging_shm.sinks.selection import Selection
from logging_shm.truncation import survive_truncation


def compile_reader() -> None:
    """Call each compiled entry with nothing to do."""
    records, origins = np.zeros((1, RECORD_BYTES), np.uint8), np.zeros(1, np.int32)
    collect(np.zeros(0, SOURCE), records[:0], origins[:0], 0, 0)
    formats = Formats(1)
    for kind in FORMATTERS:
        list(
            Formatter(kind, Selection()).chunks(
                Batch(records, origins, formats.steps, formats.literals, printable_table()), 0
            )
        )
    survive_truncation()


def main() -> None:
    """Compile for the present sources, and remove what was compiled from former ones."""
    compile_reader()
    directory = Path(os.environ["NUMBA_CACHE_DIR"])
    for former in directory.parent.iterdir():
        if former != directory:
            shutil.rmtree(former)


if __name__ == "__main__":
    main()
