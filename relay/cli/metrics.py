"""mcrctl metrics: what runs in the foreground and ends with a signal."""

import signal
import sys
from pathlib import Path
from types import FrameType

import click
from prometheus_client import CollectorRegistry, generate_latest

from relay.errors import UnreachableError
from relay.metrics.collector import RelayCollector
from relay.metrics.server import parse_listen, serving


def _report(line: str) -> None:
    click.echo(f"mcrctl metrics: {line}", err=True)


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(0)


def serve(control_socket: Path, listen: str) -> None:
    """Serve until SIGINT or SIGTERM. Raises ConfigError when nothing can listen there."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    with serving(parse_listen(listen), RelayCollector(control_socket, _report)) as (where, forever):
        _report(f"serving {where} for {control_socket}")
        forever()


def print_once(control_socket: Path) -> None:
    """Print the metrics as text. Raises UnreachableError, which has printed `mcr_up 0` before."""
    faults: list[str] = []
    registry = CollectorRegistry()
    registry.register(RelayCollector(control_socket, faults.append))
    click.echo(generate_latest(registry), nl=False)
    if faults:
        raise UnreachableError(faults[0])
