"""Memory between inaccessible pages: whoever reads or writes one byte too many dies of SIGSEGV."""

import ctypes
import mmap
import os

PROT_NONE = 0
PAGE = mmap.PAGESIZE

_libc = ctypes.CDLL(None, use_errno=True)


class Guarded:
    """`count` areas of `pages` pages each, every one with an inaccessible page before and behind it.

    `stride` is the distance from one area to the next, `base` the address of the first.
    """

    def __init__(self, count: int, pages: int) -> None:
        self.area_bytes = pages * PAGE
        self.stride = self.area_bytes + PAGE
        self._map = mmap.mmap(-1, PAGE + count * self.stride)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.base = start + PAGE
        for page in (start, *(self.end(index) for index in range(count))):
            if _libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), PROT_NONE):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "mprotect")

    def address(self, index: int) -> int:
        """Where an area begins."""
        return self.base + index * self.stride

    def end(self, index: int) -> int:
        """Behind an area: the first address that nobody may touch."""
        return self.address(index) + self.area_bytes
