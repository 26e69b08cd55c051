"""Sampling: the counters of all workers, added up, and their rates over the last second.

Owned by the supervisor. Reads the stats segments, which the workers write without a lock: a sum may be a few
packets old, never wrong by more. A worker that was taken over may have left any numbers
there: what is told are counts.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from relay.dataplane.layout import COUNT_MAX, DropCause
from relay.health import StreamHealth
from relay.latency import latency_of
from relay.messages import OutputStats, RuleStats, Stats, WorkerStats
from relay.rules import output_name
from relay.supervisor.fleet import Fleet
from relay.supervisor.plan import PlannedRule
from relay.supervisor.protection_watch import health_of
from relay.supervisor.stream_totals import StreamTotals
from relay.supervisor.streams import streams_by_rule
from relay.supervisor.worker import Worker
from relay.version import VERSION

WORKER_TOTALS = ("packets_in", "bytes_in", "packets_matched", "packets_relayed", "bytes_relayed", "packets_withheld")


@dataclass
class Sample:
    """The counters at one moment, the workers' added up."""

    time_s: float
    workers: dict[int, dict[str, int]]  # by core
    rules: Any  # RULE_STATS[RULES_MAX]
    outputs: Any  # OUTPUT_STATS[OUTPUTS_MAX]


def count(number: Any) -> int:
    """A counter or a sum of counters as a message holds it, whatever a worker wrote."""
    return min(max(int(number), 0), COUNT_MAX)


def unix_s(monotonic_ns: Any) -> float | None:
    """A worker's time as one of the wall clock, to the millisecond; None for 0, which is never, and for the future."""
    age_ns = time.monotonic_ns() - int(monotonic_ns)
    return round(time.time() - age_ns / 1e9, 3) if monotonic_ns > 0 and age_ns >= 0 else None


def worker_totals(worker: Worker) -> dict[str, int]:
    """The counters of a worker by name."""
    return {name: count(worker.stats.header[name]) for name in WORKER_TOTALS}


def worker_drops(worker: Worker) -> dict[str, int]:
    """What a worker dropped by cause; send errors by errno besides."""
    header = worker.stats.header
    drops = {cause.name.lower(): count(header["drops"][cause]) for cause in DropCause if cause is not DropCause.NONE}
    drops[DropCause.RING_FULL.name.lower()] = count(header["ring_full"])
    errno_counts = header["errno_counts"].copy()  # NumPy raises when what it looks through changes meanwhile
    for errno in np.flatnonzero(errno_counts):
        drops[f"send_error_errno_{errno}"] = count(errno_counts[errno])
    return drops


def _sum_fields(arrays: list[Any]) -> Any:
    total = arrays[0].copy()
    for array in arrays[1:]:
        for name in total.dtype.names:
            if name == "last_ns":
                np.maximum(total[name], array[name], out=total[name])
            elif name not in ("last_errno", "pad"):
                total[name] += array[name]
    return total


def take_sample(fleet: Fleet) -> Sample:
    """Read every counter now."""
    return Sample(
        time_s=time.monotonic(),
        workers={worker.core: worker_totals(worker) for worker in fleet.workers},
        rules=_sum_fields([worker.stats.rules for worker in fleet.workers]),
        outputs=_sum_fields([worker.stats.outputs for worker in fleet.workers]),
    )


class Sampler:
    """Keeps the samples that rates are made of."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._started_s = time.monotonic()
        self._stream_totals = StreamTotals(fleet)
        self._older = self._newer = take_sample(fleet)

    def tick(self) -> None:
        """Take a sample; called once a second."""
        self._older, self._newer = self._newer, take_sample(self._fleet)
        self._stream_totals.look()

    def _rate(self, newer: int, older: int) -> float:
        """Per second; counters of a slot that was given to another rule start again at 0."""
        elapsed_s = self._newer.time_s - self._older.time_s
        return max(newer - older, 0) / elapsed_s if elapsed_s > 0 else 0.0

    def workers(self) -> list[WorkerStats]:
        """The state of every worker."""
        return [self._worker(worker) for worker in self._fleet.workers]

    def _worker(self, worker: Worker) -> WorkerStats:
        newer, older = self._newer.workers[worker.core], self._older.workers[worker.core]
        return WorkerStats(
            core=worker.core,
            pid=worker.pid,
            state="running" if worker.running else "starting",
            uptime_s=round(time.monotonic() - worker.started_s, 3) if worker.running else 0.0,
            **worker_totals(worker),
            packets_per_second=self._rate(newer["packets_relayed"], older["packets_relayed"]),
            bits_per_second=8 * self._rate(newer["bytes_relayed"], older["bytes_relayed"]),
            ring_fill_max_percent=min(count(worker.stats.header["ring_fill_max"].max()), 100),
            drops=worker_drops(worker),
            is_excluded=worker.is_excluded,
            stats_segment=worker.stats.name,
            restarts=worker.restarts,
            latency=latency_of(worker.stats.health["latency"], int(worker.stats.health["latency_ns_max"])),
            frames_untracked=count(worker.stats.health["frames_untracked"]),
            ring_fill_percent=self._ring_fill(worker),
        )

    def _ring_fill(self, worker: Worker) -> dict[str, int]:
        percent = worker.stats.header["ring_fill_percent"]
        names = self._fleet.rings.interface_names()
        return {name: min(count(percent[number]), 100) for number, name in sorted(names.items())}

    def stats(self, request_id: int) -> Stats:
        """Everything, with totals as of now."""
        sample = take_sample(self._fleet)
        streams = streams_by_rule(self._fleet)
        self._stream_totals.look()
        workers = self.workers()
        drops: dict[str, int] = {}
        for worker in workers:
            for cause, dropped in worker.drops.items():
                drops[cause] = count(drops.get(cause, 0) + dropped)
        totals: Mapping[str, int] = {
            name: count(sum(worker[name] for worker in sample.workers.values())) for name in WORKER_TOTALS
        }
        return Stats(
            request_id=request_id,
            uptime_s=round(time.monotonic() - self._started_s, 3),
            **totals,
            packets_per_second=sum(worker.packets_per_second for worker in workers),
            bits_per_second=sum(worker.bits_per_second for worker in workers),
            drops=drops,
            rules=[self._rule(sample, planned, streams) for planned in self._fleet.plan.rules],
            workers=workers,
            version=VERSION,
        )

    def _rule(
        self,
        sample: Sample,
        planned: PlannedRule,
        streams: Mapping[str, Sequence[StreamHealth]],
    ) -> RuleStats:
        rule = planned.rule
        slot = self._fleet.rule_slots[rule.rule_id]
        totals = self._stream_totals.of(rule.rule_id)
        counters = sample.rules[slot]
        slots = [self._fleet.output_slots[rule.rule_id, output.output] for output in planned.outputs]
        sent, newer, older = sample.outputs[slots], self._newer.outputs[slots], self._older.outputs[slots]
        return RuleStats(
            rule_id=rule.rule_id,
            state=planned.state,
            packets_matched=count(counters["packets"]),
            bytes_matched=count(counters["bytes"]),
            packets_relayed=count(sent["packets"].sum()),
            bytes_relayed=count(sent["bytes"].sum()),
            packets_per_second=self._rate(int(newer["packets"].sum()), int(older["packets"].sum())),
            bits_per_second=8 * self._rate(int(newer["bytes"].sum()), int(older["bytes"].sum())),
            outputs=[
                OutputStats(
                    output=output_name(output.output),
                    packets=count(sent[i]["packets"]),
                    bytes=count(sent[i]["bytes"]),
                    drops={
                        DropCause.TTL.name.lower(): count(sent[i]["drops_ttl"]),
                        DropCause.EGRESS_FULL.name.lower(): count(sent[i]["drops_full"]),
                        DropCause.SEND_ERROR.name.lower(): count(sent[i]["drops_error"]),
                    },
                    slot=slots[i],
                )
                for i, output in enumerate(planned.outputs)
            ],
            slot=slot,
            last_packet_unix_s=unix_s(counters["last_ns"]),
            streams=list(streams.get(rule.rule_id, ())),
            input_rings=list(dict.fromkeys(number for _, number in self._fleet.rings.inputs_of(planned))),
            drops={DropCause.RATE_LIMIT.name.lower(): count(counters["drops_rate_limit"])},
            rtp=totals.rtp(),
            mpeg_ts=totals.mpeg_ts(),
            protection=health_of(self._fleet, rule),
        )
