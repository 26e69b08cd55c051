"""The buckets of guarded rules (guard.py): one memory file for all workers of a relay, a cache line for each rule.

Made by the supervisor, mapped by it and by every worker; workers debit them, the supervisor empties them. It ends with
the supervisor and the workers that it started: the next one makes another.
"""

import fcntl
import mmap
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from relay.dataplane.layout import GUARD_CELL, RULES_MAX

GUARD_CELLS_BYTES = RULES_MAX * GUARD_CELL.itemsize
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW  # it can't be cut under the others


def map_guard_cells(descriptor: int) -> Any:
    """GUARD_CELL[RULES_MAX], by rule slot; the descriptor is not needed any more. Raises OSError, ValueError."""
    return np.frombuffer(mmap.mmap(descriptor, GUARD_CELLS_BYTES), GUARD_CELL)


class GuardCells:
    """The file, by its descriptor. Pages of it are taken as they are written."""

    def __init__(self) -> None:
        """Full buckets. Raises OSError."""
        self._descriptor = os.memfd_create("mcr_guards", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._descriptor, GUARD_CELLS_BYTES)
            fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, SEALS)
            self.cells: Any = map_guard_cells(self._descriptor)
        except BaseException:
            os.close(self._descriptor)
            raise

    def fill(self, slots: Sequence[int]) -> None:
        """Fill the buckets of these rules, as those of new ones are."""
        if len(slots):
            self.cells[list(slots)] = 0

    def fileno(self) -> int:
        """The descriptor."""
        return self._descriptor

    def close(self) -> None:
        """Let go of it; it goes with the last process that has it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
