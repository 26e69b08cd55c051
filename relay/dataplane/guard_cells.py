"""The buckets of guarded rules (guard.py): one memory file for all workers of a relay, a cache line for each rule.

Made by the supervisor, mapped by it and by every worker; workers debit them, the supervisor empties them. It ends with
the supervisor and the workers that it started: the next one makes another.
"""

import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np

from relay.dataplane.layout import GUARD_CELL, RULES_MAX
from relay.dataplane.memory_file import MemoryFile, create_memory_file

GUARD_CELLS_BYTES = RULES_MAX * GUARD_CELL.itemsize


def map_guard_cells(descriptor: int) -> Any:
    """GUARD_CELL[RULES_MAX], by rule slot; the descriptor is not needed any more. Raises OSError, ValueError."""
    return np.frombuffer(mmap.mmap(descriptor, GUARD_CELLS_BYTES), GUARD_CELL)


class GuardCells(MemoryFile):
    """The file. Its buckets are full at first."""

    def __init__(self) -> None:
        """Make it. Raises OSError."""
        super().__init__(create_memory_file("mcr_guards", GUARD_CELLS_BYTES))
        try:
            self.cells: Any = map_guard_cells(self._descriptor)
        except BaseException:
            self.close()
            raise

    def fill(self, slots: Sequence[int]) -> None:
        """Fill the buckets of these rules, as those of new ones are."""
        if len(slots):
            self.cells[list(slots)] = 0
