"""The watch: puts together a Frame, all that is known of the relay at one moment, from counters, rules and log.

Notices what happens to the relay itself: a worker that is replaced or silent, a supervisor that has ended, a restart.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from relay.cli.top.log import LogTail
from relay.cli.top.rates import Counts, History, Past, Rates, grown, match, rates, rearranged
from relay.cli.top.rules import Asker, Rules
from relay.cli.top.segments import Segments, State, WorkerCounts, same_segments
from relay.cli.top.streams import faults
from relay.dataplane.layout import COUNT_MAX
from relay.latency import QUANTILES, quantile_ns

SILENT_NS = 1_000_000_000  # a worker's heart beats ten times a second
EVENT_SHOWN_S = 60.0


@dataclass(frozen=True)
class WorkerRow:
    """What is shown of a worker."""

    core: int
    pid: int
    state: str  # "" for one that runs
    cpu_percent: float | None
    received: float  # datagrams/s
    sent: float
    sent_bits: float
    ring_fill_percent: int
    ring_fill_percent_max: int
    drops: dict[str, int]
    drop_rate: float
    latency_ns: tuple[int, int] | None = None  # the half and 99 % were not slower since the last look; None of nothing


@dataclass(frozen=True)
class StreamRows:
    """What is wrong with the rules' streams before they reach the relay: an array of all rules each."""

    losses: Any  # f8[rules]: RTP datagrams lost and continuity errors in the last minute; -1: neither RTP nor MPEG-TS
    losses_now: Any  # f8[rules], since the last look
    jitter_ns: Any  # i8[rules]: of the worst source; -1: no RTP


@dataclass(frozen=True)
class Frame:
    """The relay at one moment. Nothing in it changes any more."""

    time_s: float  # CLOCK_MONOTONIC
    wall: datetime
    instance: str | None
    rules: Rules
    counts: Counts
    rates: Rates
    streams: StreamRows
    past: Past
    workers: tuple[WorkerRow, ...]
    drops: dict[str, tuple[int, float]]  # by cause: all of them, and per second
    log: tuple[str, ...]
    condition: str = ""  # what is wrong, as long as it is
    event: str = ""  # what happened lately
    are_rules_old: bool = False  # the relay has changed them, and has not yet told how


def _rate(newer: int, older: int, elapsed_s: float) -> float:
    return float(grown(newer, older)) / elapsed_s if elapsed_s > 0 else 0.0


def _latency_ns(datagrams: Any) -> tuple[int, int] | None:
    """Quantiles of what was sent between two looks: i8[LATENCY_BUCKETS]."""
    if not datagrams.any():
        return None
    counts = datagrams.tolist()
    return quantile_ns(counts, QUANTILES["p50_us"], COUNT_MAX), quantile_ns(counts, QUANTILES["p99_us"], COUNT_MAX)


@dataclass
class _Seen:
    """What was known at the last look."""

    time_s: float = 0.0
    counts: Counts | None = None
    workers: dict[int, WorkerCounts] = field(default_factory=dict)
    state: State = ()


class _Cpu:
    """The share of a core that a process takes."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[float, float]] = {}  # by pid: when, seconds of CPU

    def percent(self, pid: int, now_s: float) -> float | None:
        """Since the last call; None at the first. Raises psutil.Error when there is no such process."""
        times = psutil.Process(pid).cpu_times()
        used_s = times.user + times.system
        former = self._seen.get(pid)
        self._seen[pid] = (now_s, used_s)
        if former is None or now_s <= former[0]:
            return None
        return 100 * max(used_s - former[1], 0.0) / (now_s - former[0])


class Watch:
    """Looks at one relay, again and again."""

    def __init__(self, path: Path, instance: str | None, wake: Callable[[], None]) -> None:
        self._instance = instance
        self._segments = Segments(instance)
        self._asker = Asker(path, wake)
        self._log = LogTail(instance)
        self._rules = Rules()
        self._history = History()
        self._losses = History()
        self._seen = _Seen()
        self._cpu = _Cpu()
        self._event = ("", 0.0)

    def begin(self) -> None:
        """Find segments and rules. Raises RelayError."""
        self._segments.refresh()
        self._rules = self._asker.now(self._segments.state())
        self._history.rearrange(match(self._rules.ids, ()))
        self._losses.rearrange(match(self._rules.ids, ()))

    def look(self) -> Frame:
        """The relay now. Raises PreflightError when it has new segments that may not be read."""
        self._segments.refresh()
        state = self._segments.state()
        answer = self._asker.poll(state) if state else None
        now_s = time.monotonic()
        elapsed_s = now_s - self._seen.time_s if self._seen.time_s else 0.0
        if answer is not None:
            self._go_over(answer)
        older = self._seen.counts
        # Places hold for the segments that they were asked for; without those, what was counted is all that is known.
        if older is None or same_segments(state, self._asker.asked_for):
            newer = self._segments.rules(self._rules.places)
        else:
            newer = older
        older = newer if older is None else older
        per_second = rates(newer, older, elapsed_s)
        self._history.add(now_s, grown(newer.received, older.received))
        streams = self._streams(now_s)
        workers = self._segments.workers()
        self._notice(state, workers, now_s)
        rows = tuple(self._row(worker, elapsed_s, now_s) for worker in workers)
        frame = Frame(
            time_s=now_s,
            wall=datetime.now(),
            instance=self._instance,
            rules=self._rules,
            counts=newer,
            rates=per_second,
            streams=streams,
            past=self._history.snapshot(),
            workers=rows,
            drops=self._drops(workers, elapsed_s),
            log=self._log.read(),
            condition=self._condition(rows),
            are_rules_old=state != self._asker.asked_for,
            event=self._event[0] if now_s - self._event[1] < EVENT_SHOWN_S else "",
        )
        self._seen = _Seen(now_s, newer, {worker.core: worker for worker in workers}, state or self._seen.state)
        return frame

    def _go_over(self, rules: Rules) -> None:
        former = match(rules.ids, self._rules.ids)
        self._rules = rules
        self._history.rearrange(former)
        self._losses.rearrange(former)
        if self._seen.counts is not None:
            counts = self._segments.rules(rules.places)
            self._seen.counts = Counts(
                *(rearranged(was, former, now) for was, now in zip(self._seen.counts, counts, strict=True))
            )

    def _streams(self, now_s: float) -> StreamRows:
        told = faults(self._rules.taken_in, self._segments.streams(), time.monotonic_ns())
        self._losses.add(now_s, told.losses)
        losses = np.where(told.is_looked_into, self._losses.last_minute(), -1)
        return StreamRows(losses, told.losses, told.jitter_ns)

    def _row(self, worker: WorkerCounts, elapsed_s: float, now_s: float) -> WorkerRow:
        older = self._seen.workers.get(worker.core, worker)
        silent_ns = time.monotonic_ns() - worker.heartbeat_ns
        state, cpu_percent = "", None
        try:
            cpu_percent = self._cpu.percent(worker.pid, now_s) if worker.pid else None
        except (psutil.Error, ValueError, OverflowError):
            state = "gone"
        if not worker.pid or not worker.heartbeat_ns:
            state = "starting"
        elif not state and silent_ns > SILENT_NS:
            state = f"silent for {silent_ns / 1e9:.0f} s"
        return WorkerRow(
            core=worker.core,
            pid=worker.pid,
            state=state,
            cpu_percent=cpu_percent,
            received=_rate(worker.received, older.received, elapsed_s),
            sent=_rate(worker.sent, older.sent, elapsed_s),
            sent_bits=8 * _rate(worker.sent_bytes, older.sent_bytes, elapsed_s),
            ring_fill_percent=worker.ring_fill_percent,
            ring_fill_percent_max=worker.ring_fill_percent_max,
            drops=worker.drops,
            drop_rate=sum(_rate(n, older.drops[cause], elapsed_s) for cause, n in worker.drops.items()),
            latency_ns=_latency_ns(grown(worker.latencies, older.latencies)),
        )

    def _drops(self, workers: list[WorkerCounts], elapsed_s: float) -> dict[str, tuple[int, float]]:
        drops: dict[str, tuple[int, float]] = {}
        for worker in workers:
            older = self._seen.workers.get(worker.core, worker)
            for cause, total in worker.drops.items():
                former, rate = drops.get(cause, (0, 0.0))
                drops[cause] = (former + total, rate + _rate(total, older.drops[cause], elapsed_s))
        return drops

    def _notice(self, state: State, workers: list[WorkerCounts], now_s: float) -> None:
        if state and self._seen.state and not same_segments(state, self._seen.state):
            self._event = (f"{datetime.now():%H:%M:%S} the relay has started anew", now_s)
            return
        for worker in workers:
            was = self._seen.workers.get(worker.core)
            if was is not None and was.pid and worker.pid and was.pid != worker.pid:
                what = f"the worker on core {worker.core} was replaced: process {was.pid}, now {worker.pid}"
                self._event = (f"{datetime.now():%H:%M:%S} {what}", now_s)

    def _condition(self, workers: tuple[WorkerRow, ...]) -> str:
        if not workers:
            return "the relay has ended; waiting for it to come back"
        if not self._log.supervisor_runs():
            if all(worker.state for worker in workers):
                return "the relay was killed: this is what it left; waiting for it to come back"
            return "mcrd has ended: its workers relay on under the rules that it left; start it again"
        ill = [f"core {worker.core} is {worker.state}" for worker in workers if worker.state]
        if ill:
            return f"worker of {ill[0]}" + (f", and {len(ill) - 1} more" if len(ill) > 1 else "")
        if self._asker.error is not None:
            return f"rules may be out of date: {self._asker.error}"
        return ""
