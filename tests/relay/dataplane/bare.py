"""A worker's memory without a process, a ring or sockets, for what only computes."""

import numpy as np

from relay.dataplane import layout, memory
from relay.dataplane.copies import COPIES_BYTES


def bare_memory() -> memory.Memory:
    """Everything that compiled functions use; nothing can be sent."""
    log = np.zeros(128, np.uint8)  # every level is off
    sqes = np.zeros(memory.SQ_ENTRIES, layout.IO_URING_SQE)
    cqes, stats = np.zeros(1, layout.IO_URING_CQE), np.zeros(layout.STATS_BYTES, np.uint8)
    return memory.Memory(sqes, cqes, stats, np.zeros(COPIES_BYTES, np.uint8), (log,) * 4)
