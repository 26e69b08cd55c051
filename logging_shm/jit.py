"""The decorator of all compiled code here: cached, without the GIL, and without counting references.

Numba counts the references of every array that compiled code touches, by atomic additions that cost more than a log
record does. Code that allocates nothing needs none of that.
"""

from pathlib import Path
from typing import Any

from numba import config, njit
from numba.core import caching

from logging_shm import cache

_WITHOUT_REFERENCES: dict[str, Any] = {"_nrt": False}  # a flag of Numba's own, for code that it generates itself


def _read_in_place() -> None:
    """Have Numba use our directory of compiled code as it is when it exists.

    Numba makes a file there for each function, to see whether it could write, and turns to directories of the user's
    when it can't. A service reads code that is not its own to write.
    """
    locators = caching.FunctionCache._impl_class._locator_classes
    provided: Any = locators[0]

    class InPlace(provided):  # type: ignore[misc]
        def ensure_cache_path(self) -> None:
            directory = getattr(config, "CACHE_DIR", "")
            if directory not in cache.chosen or not Path(self.get_cache_path()).is_dir():
                super().ensure_cache_path()

    locators[0] = InPlace


_read_in_place()


def compiled(function: Any = None, **options: Any) -> Any:
    """As numba.njit. The function may use arrays that it is given, but can't make or return one."""
    decorate: Any = njit(cache=True, nogil=True, error_model="numpy", **_WITHOUT_REFERENCES, **options)
    return decorate if function is None else decorate(function)
