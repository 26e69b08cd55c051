"""A memory file of fixed size that processes share: nobody can cut or grow it under the others. man 2 memfd_create."""

import fcntl
import os

SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def create_memory_file(name: str, size_bytes: int) -> int:
    """The descriptor of an empty one, which the caller owns; pages are taken as they are written. Raises OSError."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size_bytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


class MemoryFile:
    """One, by its descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @staticmethod
    def is_sealed(descriptor: int, size_bytes: int) -> bool:
        """Whether a descriptor is of one of this size. Raises OSError when it is of no memory file."""
        return fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) == SEALS and os.fstat(descriptor).st_size == size_bytes

    def fileno(self) -> int:
        """The descriptor."""
        return self._descriptor

    def close(self) -> None:
        """Let go of it; it goes with the last process that has it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
