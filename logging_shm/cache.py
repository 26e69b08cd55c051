"""Where Numba keeps compiled code: a directory for each state of the sources.

Numba renews a cached function when its own file changes, not when a function that it calls does. So the directory is
named after a hash of all sources that are compiled together; `make setup` fills it and removes former ones.
"""

import hashlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path

chosen: set[str] = set()  # directories that are read in place, where this user may not write


def use(name: str, folders: Iterable[Path]) -> Path:
    """Have Numba cache under `sys.prefix`/var/`name`, by the state of the sources in `folders`; return where."""
    digest = hashlib.sha256()
    for folder in folders:
        for source in sorted(folder.glob("*.py")):
            digest.update(source.read_bytes())
    directory = Path(sys.prefix) / "var" / name / digest.hexdigest()[:16]
    chosen.add(str(directory))
    os.environ["NUMBA_CACHE_DIR"] = str(directory)
    if "numba" in sys.modules:
        sys.modules["numba"].config.CACHE_DIR = str(directory)
    return directory


def use_own() -> None:
    """As `use` for this package alone, unless a program that embeds it has chosen a directory."""
    if "NUMBA_CACHE_DIR" in os.environ:
        chosen.add(os.environ["NUMBA_CACHE_DIR"])
    else:
        use("logging-shm-compiled", [Path(__file__).parent])
