"""Figures as they are measured: by part, case and metric a list with one value for each round. Pure."""

import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

FLAT_OUT = 0.0
WIRE = "wire"  # the generator's super-frames are cut before the first cable: frames arrive in trains of one stream
SUPER = "super"  # super-frames arrive whole
SINGLE = "single"  # one send each, streams in turn
# Whose core takes a packet in: on one machine the sender's, which hands a relay in the kernel its work at no cost.
# With the sender elsewhere it is a core of the relay's host, woken by an interrupt.
ON_SENDERS_CORE = "sender"
ON_RELAYS_CORE = "relay"


@dataclass(frozen=True)
class Case:
    """What was measured: the contender, and what it was asked to do. None: of no meaning here."""

    contender: str
    size: int | None = None
    frames: str | None = None
    rate: float | None = None  # datagrams/s, FLAT_OUT for as many as go
    streams: int | None = None
    outputs: int | None = None
    rules: int | None = None
    workers: int | None = None
    idle: str | None = None
    interrupts: str | None = None

    def parameters(self) -> dict[str, Any]:
        """Those that mean something."""
        return {key: value for key, value in asdict(self).items() if value is not None}


class Figure(NamedTuple):
    """The values of one metric in all rounds."""

    values: list[float]

    @property
    def median(self) -> float:
        """The figure to compare."""
        return statistics.median(self.values)

    @property
    def least(self) -> float:
        """The least of all rounds."""
        return min(self.values)

    @property
    def most(self) -> float:
        """The most of all rounds."""
        return max(self.values)


@dataclass(frozen=True)
class Trial:
    """One step of a search: a point of the curve loss against rate."""

    case: Case
    pps: float
    loss: float


@dataclass
class Results:
    """Everything measured, in order."""

    figures: dict[tuple[str, Case, str], Figure] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was skipped, and why

    def add(self, part: str, case: Case, **metrics: float | None) -> None:
        """Keep a round's values; None is no value."""
        for metric, value in metrics.items():
            if value is not None:
                self.figures.setdefault((part, case, metric), Figure([])).values.append(value)

    def get(self, part: str, case: Case, metric: str) -> float | None:
        """The median, None when it was not measured."""
        figure = self.figures.get((part, case, metric))
        return figure.median if figure else None

    def note(self, line: str) -> None:
        """Keep a remark, once."""
        if line not in self.notes:
            self.notes.append(line)

    def parts(self) -> list[str]:
        """The parts that have figures."""
        return list(dict.fromkeys(part for part, _, _ in self.figures))

    def cases(self, part: str) -> list[Case]:
        """The cases of a part."""
        return list(dict.fromkeys(case for of_part, case, _ in self.figures if of_part == part))

    def metrics(self, part: str) -> list[str]:
        """The metrics of a part."""
        return list(dict.fromkeys(metric for of_part, _, metric in self.figures if of_part == part))

    def as_json(self) -> list[dict[str, Any]]:
        """One object a figure."""
        return [
            {
                "part": part,
                **case.parameters(),
                "metric": metric,
                "median": figure.median,
                "min": figure.least,
                "max": figure.most,
                "values": figure.values,
            }
            for (part, case, metric), figure in self.figures.items()
        ]

    def trials_as_json(self) -> list[dict[str, Any]]:
        """One object a trial."""
        return [{**trial.case.parameters(), "pps": trial.pps, "loss": trial.loss} for trial in self.trials]


def varying(cases: list[Case]) -> Iterator[str]:
    """The parameters that a table of these cases must show."""
    for parameter in fields(Case):
        values = {getattr(case, parameter.name) for case in cases}
        if len(values) > 1 or parameter.name == "contender":
            yield parameter.name
