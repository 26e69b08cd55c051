"""The collector: asks the relay at each scrape and makes metrics of its answer.

Runs in a thread of the HTTP server, one scrape at a time: of many that come at once each waits for its turn. Keeps
nothing from one scrape to the next but what was last wrong, so that the log has a line when that changes.
"""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from relay.client import Client
from relay.errors import RelayError
from relay.messages import Stats
from relay.metrics.families import FAMILIES, limited

ASK_S_MAX = 5.0  # half of Prometheus' usual time-out for a scrape

UP = ("mcr_up", "Whether the relay behind the control socket has answered.")
BUILD = ("mcr_build", "The relay's version.")
OMITTED = ("mcr_metrics_omitted", "Rules and outputs without series of their own: there are more than the limit.")


class RelayCollector(Collector):
    """For the registry of prometheus_client. `report` gets a line when the relay goes and when it comes."""

    def __init__(self, control_socket: Path, report: Callable[[str], None]) -> None:
        self._control_socket = control_socket
        self._report = report
        self._fault: str | None = None
        self._turn = threading.Lock()

    def describe(self) -> Iterator[Any]:
        """The metrics without samples: nobody is asked for them."""
        yield GaugeMetricFamily(*UP)
        yield InfoMetricFamily(*BUILD)
        yield GaugeMetricFamily(*OMITTED)
        for family in FAMILIES:
            yield family.empty()

    def collect(self) -> Iterator[Any]:
        """The metrics of this moment; `mcr_up` alone when no relay answers."""
        with self._turn:
            answered = self._ask()
        yield GaugeMetricFamily(*UP, value=float(answered is not None))
        if answered is None:
            return
        yield InfoMetricFamily(*BUILD, value={"version": answered.version})
        stats, rules, outputs = limited(answered)
        omitted = GaugeMetricFamily(*OMITTED, labels=("kind",))
        omitted.add_metric(("rules",), rules)
        omitted.add_metric(("outputs",), outputs)
        yield omitted
        for family in FAMILIES:
            yield family.fill(stats)

    def _ask(self) -> Stats | None:
        try:
            with Client(self._control_socket, ASK_S_MAX) as client:
                answered = client.stats()  # one request: the relay logs each
        except RelayError as error:
            if self._fault is None:
                self._report(str(error))
            self._fault = str(error)
            return None
        if self._fault is not None:
            self._report(f"{self._control_socket}: the relay answers again")
        self._fault = None
        return answered
