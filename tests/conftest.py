"""For every test: hypothesis measures no time, as this machine's other load would decide the outcome.

SIGINT has its effect, also where a shell started the tests in the background, and so with that signal ignored: what
tests start inherits it.
"""

import signal

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """For the fuzz and soak tests."""
    parser.addoption("--minutes", type=float, default=0.0, help="each fuzz or soak test goes on for so long")
