"""Shared-memory log rings: preallocated, written without a system call, read by anyone allowed to.

    from logging_shm import Facility, SharedSPSCRingBuffer
    ring = SharedSPSCRingBuffer.create("my_ring")
    Logger(ring, Facility.Test).info("hello")
    print(ring.read())

Look at the rings from a shell with `mcrlog list` and `ls /dev/shm`.
"""

from logging_shm.drain import Drain
from logging_shm.facility import Facility, Severity
from logging_shm.logger import ControlPlaneLogging, DataPlaneLogging, Logger, SupervisorLogging
from logging_shm.manager import SharedMemoryLogManager
from logging_shm.ring import LogEntry, SharedSPSCRingBuffer
from logging_shm.segment import Segment, SegmentError

__all__ = [
    "ControlPlaneLogging",
    "DataPlaneLogging",
    "Drain",
    "Facility",
    "LogEntry",
    "Logger",
    "Segment",
    "SegmentError",
    "Severity",
    "SharedMemoryLogManager",
    "SharedSPSCRingBuffer",
    "SupervisorLogging",
]
