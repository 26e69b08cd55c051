"""The copy arena of a worker: frames too large for a ring's slot, fetched whole from the socket's receive queue.

A frame that was fetched is nowhere else, so the arena outlives the process that fetched it: a memory file, made by the
supervisor, kept for the worker's successor and for the next supervisor. Written by the worker that reads the rings
(ring.py), and by its successor where it goes on. The supervisor never maps it.
"""

import mmap
import os
from typing import Any

import numpy as np

from relay.dataplane.layout import MMSGHDR, RINGS_MAX
from relay.dataplane.memory_file import MemoryFile, create_memory_file

COPY_SLOTS = 8  # super-frames fetched by one recvmmsg: 8 x 68 KiB stay within a usual L2 cache until they are sent
COPY_SLOT_BYTES = 69_632  # virtio header, Ethernet with two tags, 65 535 bytes of IP; a multiple of 4096
PAGE_BYTES = 4096

COPIES_HEADER = np.dtype(
    [
        ("mmsg", MMSGHDR, (RINGS_MAX, COPY_SLOTS)),  # msg_len: 0 for none. Pointers are those of the last process
        ("places", "<i8", (RINGS_MAX, COPY_SLOTS)),  # the ring slot that a copy was parsed for, plus 1; 0: not yet
    ]
)
ARENA_OFFSET = -(-COPIES_HEADER.itemsize // PAGE_BYTES) * PAGE_BYTES
COPIES_BYTES = ARENA_OFFSET + RINGS_MAX * COPY_SLOTS * COPY_SLOT_BYTES


class Copies(MemoryFile):
    """A worker's copy arena."""

    @classmethod
    def create(cls) -> "Copies":
        """An empty one. Raises OSError."""
        return cls(create_memory_file("mcr_copies", COPIES_BYTES))

    @classmethod
    def is_one(cls, descriptor: int) -> bool:
        """Whether a descriptor is of a copy arena. Raises OSError when it is of no memory file."""
        return cls.is_sealed(descriptor, COPIES_BYTES)

    def forget(self, ring_number: int) -> None:
        """Nothing fetched of this ring is wanted any more: its number goes to another. Raises OSError."""
        mmsg, offset = COPIES_HEADER.fields["mmsg"][:2]  # type: ignore[index]
        ring_bytes = mmsg.itemsize // RINGS_MAX
        os.pwrite(self._descriptor, bytes(ring_bytes), offset + ring_number * ring_bytes)


def map_copies(descriptor: int) -> Any:
    """Map an arena, as bytes. The mapping has a descriptor of its own, see salvage.py. Raises OSError."""
    return np.frombuffer(mmap.mmap(descriptor, COPIES_BYTES), np.uint8)
