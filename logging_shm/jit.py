"""The decorator of all compiled code here: cached, without the GIL, and without counting references.

Numba counts the references of every array that compiled code touches, by atomic additions that cost more than a log
record does. Code that allocates nothing needs none of that.
"""

from typing import Any

from numba import njit

_WITHOUT_REFERENCES: dict[str, Any] = {"_nrt": False}  # a flag of Numba's own, for code that it generates itself


def compiled(function: Any = None, **options: Any) -> Any:
    """As numba.njit. The function may use arrays that it is given, but can't make or return one."""
    decorate: Any = njit(cache=True, nogil=True, error_model="numpy", **_WITHOUT_REFERENCES, **options)
    return decorate if function is None else decorate(function)
