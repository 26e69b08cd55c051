"""Shared-memory log rings: preallocated, written without a system call, read by anyone allowed to.

    from logging_shm import Facility, Logger, SharedSPSCRingBuffer
    ring = SharedSPSCRingBuffer.create("mcr_my_ring")
    Logger(ring).info("hello", rule="tv")
    print(ring.read())

Look at the rings from a shell with `mcrlog list` and `ls /dev/shm`. What reads and formats in compiled code (Drain,
Reader and the sinks) is imported when it is first asked for: writing from Python needs neither NumPy nor Numba.
"""

import importlib
from typing import TYPE_CHECKING, Any

from logging_shm.facility import Facility, Severity
from logging_shm.levels import LevelPolicy
from logging_shm.logger import ControlPlaneLogging, DataPlaneLogging, Logger, SupervisorLogging
from logging_shm.manager import SharedMemoryLogManager
from logging_shm.ring import LogEntry, SharedSPSCRingBuffer
from logging_shm.segment import Segment, SegmentError

if TYPE_CHECKING:
    from logging_shm.bridge import RingHandler
    from logging_shm.drain import Drain
    from logging_shm.reader import Reader

_COMPILED = {"Drain": "logging_shm.drain", "Reader": "logging_shm.reader", "RingHandler": "logging_shm.bridge"}

__all__ = [
    "ControlPlaneLogging",
    "DataPlaneLogging",
    "Drain",
    "Facility",
    "LevelPolicy",
    "LogEntry",
    "Logger",
    "Reader",
    "RingHandler",
    "Segment",
    "SegmentError",
    "Severity",
    "SharedMemoryLogManager",
    "SharedSPSCRingBuffer",
    "SupervisorLogging",
]


def __getattr__(name: str) -> Any:
    if name not in _COMPILED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_COMPILED[name]), name)
