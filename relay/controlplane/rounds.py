"""Rounds: one answer for all who ask the same at the same time, so that many clients cost no more than one.

Who asks while a round is under way is served by the next: no answer is older than its question.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

REST_S_MAX = 1.0

Result = TypeVar("Result")


class Rounds(Generic[Result]):
    """`make` is called for one round after another, at most half of the time, and never for nobody."""

    def __init__(self, make: Callable[[], Awaitable[Result]]) -> None:
        self._make = make
        self._current: asyncio.Task[Result] | None = None
        self._next: asyncio.Task[Result] | None = None
        self._rested_at_s = 0.0

    async def join(self) -> Result:
        """The result of the next round. Raises what `make` raises."""
        if self._next is None:
            self._next = asyncio.create_task(self._round(self._current))
        return await asyncio.shield(self._next)

    async def _round(self, former: asyncio.Task[Result] | None) -> Result:
        if former is not None:
            await asyncio.wait([former])
        await asyncio.sleep(max(self._rested_at_s - time.monotonic(), 0))
        self._current, self._next = self._next, None
        start_s = time.monotonic()
        try:
            return await self._make()
        finally:
            end_s = time.monotonic()
            self._rested_at_s = end_s + min(end_s - start_s, REST_S_MAX)
