"""How long the fuzz tests go on."""

import pytest


@pytest.fixture
def fuzz_seconds(request: pytest.FixtureRequest) -> float:
    """So many seconds instead of a count, if `--minutes` was given; else 0."""
    minutes: float = request.config.getoption("--minutes")
    return minutes * 60
