"""Moments on a command line: how long ago, or when. Imports nothing that is slow to load."""

import re
import time
from datetime import UTC, datetime

import click

AGO = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
NEVER_NS = (1 << 63) - 1


class Moment(click.ParamType):  # type: ignore[type-arg]
    """`5m`, `30s`, `1h` ago, or a time such as 2026-11-24T17:00:00 in UTC; gives CLOCK_MONOTONIC nanoseconds."""

    name = "time"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Raises click's error for what is no time."""
        match = AGO.fullmatch(value)
        try:
            if match:
                return max(time.monotonic_ns() - int(float(match[1]) * SECONDS[match[2]] * 1e9), 0)
            moment = datetime.fromisoformat(value)
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is no time: expected 30s, 5m, 1h, or 2026-11-24T17:00:00", param, ctx)
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return min(max(int(moment.timestamp() * 1e9) - (time.time_ns() - time.monotonic_ns()), 0), NEVER_NS)
