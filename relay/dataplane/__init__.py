"""The data path of one worker: ring → parse → match → coalesce → send, compiled by Numba."""

from pathlib import Path

from logging_shm import cache

_ROOT = Path(__file__).parents[2]
CACHE_DIRECTORY = cache.use("mcr-compiled", [_ROOT / part for part in ("relay/dataplane", "logging_shm", "tools")])
