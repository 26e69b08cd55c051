"""The columns of the rules' table: what each shows, sorts by, and how much room it takes.

To add one: an array of all rules in Frame, which watch.py fills, and one entry of COLUMNS.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from relay.cli.top.watch import Frame

BARS_RANK, ADDRESSES_RANK = 2, 3
NS_PER_S = 1_000_000_000
PLAIN_MAX = 99_999  # counts up to this are shown in full


def short(value: float) -> str:
    """A number in three digits and its unit: at most six characters for what a relay can reach."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit * 0.9995:
            scaled = value / limit
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f} {unit}"
    return f"{value:.0f}" if value >= 9.95 or value == int(value) else f"{value:.1f}"


def plain(number: int) -> str:
    """A count, in full while it is short."""
    return str(number) if number <= PLAIN_MAX else short(number)


def age(since_s: float) -> str:
    """How long ago, in one unit."""
    if since_s < 1:
        return "<1 s"
    for limit_s, length_s, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if since_s < limit_s:
            return f"{since_s / length_s:.0f} {unit}"
    return f"{since_s / 86_400:.0f} d"


def duration(ns: float) -> str:
    """A latency or jitter in at most three digits and its unit: at most six characters up to 17 minutes."""
    unit, unit_ns = ("s", 1e9) if ns >= 999.5e6 else ("ms", 1e6) if ns >= 999.5e3 else ("µs", 1e3)
    value = ns / unit_ns
    return f"{value:.1f} {unit}" if value < 9.95 else f"{value:.0f} {unit}"


@dataclass(frozen=True)
class Column:
    """A column of numbers. `rank` says how soon it gives way on a narrow screen, the greatest first, 0 never.

    Bars give way after those above BARS_RANK, addresses after those above ADDRESSES_RANK.
    """

    key: str  # sorts by it
    title: str
    width: int
    rank: int
    values: Callable[[Frame], Any]  # f8[rules], by which rules are sorted
    text: Callable[[Frame, int], str]  # of one rule
    style: Callable[[Frame, int], str] = lambda frame, rule: ""


def _age_text(frame: Frame, rule: int) -> str:
    last_ns = int(frame.counts.last_ns[rule])
    return age(frame.time_s - last_ns / NS_PER_S) if last_ns else "never"


def _drop_style(frame: Frame, rule: int) -> str:
    if frame.rates.drops[rule] > 0:
        return "bold red"
    return "yellow" if frame.counts.drops[rule] else "dim"


def _loss_style(frame: Frame, rule: int) -> str:
    if frame.streams.losses_now[rule] > 0:
        return "bold red"
    return "yellow" if frame.streams.losses[rule] > 0 else "dim"


def _loss_text(frame: Frame, rule: int) -> str:
    losses = frame.streams.losses[rule]
    return "" if losses < 0 else plain(int(losses))


def _jitter_text(frame: Frame, rule: int) -> str:
    jitter_ns = int(frame.streams.jitter_ns[rule])
    return "" if jitter_ns < 0 else duration(jitter_ns)


COLUMNS = (
    Column("i", "in/s", 6, 0, lambda f: f.rates.received, lambda f, r: short(f.rates.received[r])),
    Column("o", "out/s", 6, 0, lambda f: f.rates.sent, lambda f, r: short(f.rates.sent[r])),
    Column("b", "bit/s", 6, 0, lambda f: f.rates.sent_bits, lambda f, r: short(f.rates.sent_bits[r])),
    Column("e", "drop/s", 7, 4, lambda f: f.rates.drops, lambda f, r: short(f.rates.drops[r]), _drop_style),
    Column("d", "drops", 6, 0, lambda f: f.counts.drops, lambda f, r: plain(int(f.counts.drops[r])), _drop_style),
    Column("a", "last", 7, 2, lambda f: f.counts.last_ns, _age_text),
    Column("l", "loss", 6, 1, lambda f: f.streams.losses, _loss_text, _loss_style),
    Column("J", "jitter", 7, 3, lambda f: f.streams.jitter_ns, _jitter_text),
)
