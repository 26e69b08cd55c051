"""The data path of one worker: ring → parse → match → coalesce → send, compiled by Numba.

Numba renews a cached function when its own file changes, not when a function that it calls does. So the
cache has a directory for each state of the sources; `make setup` fills it.
"""

import hashlib
import os
import sys
from pathlib import Path


def _cache_directory() -> Path:
    digest = hashlib.sha256()
    root = Path(__file__).parents[2]
    for part in ("relay/dataplane", "logging_shm", "tools"):
        for source in sorted((root / part).glob("*.py")):
            digest.update(source.read_bytes())
    return Path(sys.prefix) / "var" / "mcr-compiled" / digest.hexdigest()[:16]


CACHE_DIRECTORY = _cache_directory()
os.environ["NUMBA_CACHE_DIR"] = str(CACHE_DIRECTORY)
if "numba" in sys.modules:
    sys.modules["numba"].config.CACHE_DIR = str(CACHE_DIRECTORY)
