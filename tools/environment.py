"""Makes `python tools/….py` work with any Python: goes over to the checkout's virtual environment if need be."""

import importlib.util
import os
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]


def enter() -> None:
    """Run this program again with the environment's Python when this one lacks the packages."""
    if importlib.util.find_spec("numba") and importlib.util.find_spec("relay"):
        return
    python = CHECKOUT / ".venv" / "bin" / "python"
    if not python.exists() or Path(sys.prefix) == python.parents[1]:
        sys.exit(f"{sys.argv[0]}: no virtual environment in {CHECKOUT}: run `make setup` first")
    os.execv(python, [str(python), *sys.argv])
