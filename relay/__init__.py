"""Multicast relay.

For programs that script a running relay: `from relay import Client, Rule, Output`, see docs/api.md. Names are loaded
when they are asked for, so that importing this costs nothing, and nothing of the data path.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relay.api import ActiveRule, Added, Pong, Removed
    from relay.async_client import AsyncClient
    from relay.client import Client
    from relay.errors import ControlError, RelayError, RuleError, UnreachableError
    from relay.messages import OutputStats, RuleStats, Stats, WorkerStats
    from relay.rules import Output, Rule, parse_output

# NumPy's linear algebra is not used here. The threads that it would start at import would keep the capabilities that
# the main thread gives up: each thread has its own.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

__version__ = "0.1.0"

__all__ = (
    "ActiveRule",
    "Added",
    "AsyncClient",
    "Client",
    "ControlError",
    "Output",
    "OutputStats",
    "Pong",
    "RelayError",
    "Removed",
    "Rule",
    "RuleError",
    "RuleStats",
    "Stats",
    "UnreachableError",
    "WorkerStats",
    "parse_output",
)

_HOMES = {
    "relay.api": ("ActiveRule", "Added", "Pong", "Removed"),
    "relay.async_client": ("AsyncClient",),
    "relay.client": ("Client",),
    "relay.errors": ("ControlError", "RelayError", "RuleError", "UnreachableError"),
    "relay.messages": ("OutputStats", "RuleStats", "Stats", "WorkerStats"),
    "relay.rules": ("Output", "Rule", "parse_output"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """A name of __all__, from where it lives. Raises AttributeError."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)
