#!/usr/bin/env python3
"""recv_mcast: joins groups and checks what tools/send_mcast.py sent.

    python tools/recv_mcast.py --group 239.2.2.2 --port 6001 --interface lo --duration 12

Tells lost, duplicated, reordered and altered datagrams by flow, and latency from the kernel's receive time.
Ctrl-C ends it at once, SIGTERM when nothing has come for two seconds. With --told, so does a number on standard input,
or as soon as so many datagrams have come. Exit status 1 when anything is wrong.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools import environment

environment.enter()

import contextlib
import json
import select
import signal
import socket
import struct
import time
from dataclasses import dataclass
from typing import IO, Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from tools.addressing import Interface, UsageError, find_interface, parse_group, spread
from tools.receiving import (
    SO_RXQ_OVFL,
    SO_TIMESTAMPNS,
    SOL_UDP,
    UDP_GRO,
    Receiver,
    bucket_ns,
    make_receiver,
    receive,
)

SO_RCVBUFFORCE = 33
RECEIVE_BUFFER_BYTES = 256 << 20
POLL_MS = 100
ROUNDS_MAX = 2000
RECORD_BYTES_MAX = 512 << 20
MCAST_JOIN_SOURCE_GROUP = 46
PERCENTILES = (50, 90, 99, 99.9)
FOREVER = 1 << 62
DRAIN_IDLE_S = 2.0
TOLD_IDLE_S = 10.0
DRAIN_S_MAX = 30.0  # from a sender that goes on
FLOWS_SHOWN = 20


@dataclass
class Ending:
    """When to stop."""

    count: int
    deadline_s: float
    idle_s: float | None
    interrupted: bool = False
    drained_since_s: float | None = None

    def look(self, told: IO[str] | None) -> None:
        """Read how many datagrams are to come, if that was told."""
        if told is not None and select.select([told], [], [], 0)[0]:
            line = told.readline()
            self.count = int(line) if line.strip() else FOREVER
            self.drain(TOLD_IDLE_S)

    def drain(self, idle_s: float) -> None:
        """End when nothing more comes: what is on its way still counts."""
        if self.drained_since_s is not None:
            return
        self.drained_since_s = time.monotonic()
        self.idle_s = idle_s
        self.deadline_s = min(self.deadline_s, self.drained_since_s + DRAIN_S_MAX)

    def is_idle(self, last_s: float | None, present_s: float) -> bool:
        """Whether it has been silent for long enough; `last_s` is when the last datagram came, None for never."""
        if self.idle_s is None or (last_s is None and self.drained_since_s is None):
            return False
        return present_s - max(last_s or 0.0, self.drained_since_s or 0.0) >= self.idle_s


def sockaddr_storage(address: str) -> bytes:
    """A struct sockaddr_storage with an IPv4 address."""
    return struct.pack("=HH4s", socket.AF_INET, 0, socket.inet_aton(address)).ljust(128, b"\0")


def join(sock: socket.socket, group: str, interface: Interface, source: str | None) -> None:
    """Join a group, of one source if given."""
    if source is None:
        request = struct.pack("@4s4si", socket.inet_aton(group), bytes(4), interface.index)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)
        return
    request = struct.pack("@I4x", interface.index) + sockaddr_storage(group) + sockaddr_storage(source)
    sock.setsockopt(socket.IPPROTO_IP, MCAST_JOIN_SOURCE_GROUP, request)


def open_socket(group: str, port: int, interface: Interface, source: str | None) -> socket.socket:
    """A socket for one group and port, joined. Raises UsageError when the kernel refuses."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
    sock.setsockopt(SOL_UDP, UDP_GRO, 1)
    sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    sock.setsockopt(socket.SOL_SOCKET, SO_RXQ_OVFL, 1)
    try:
        sock.bind((group, port))
        if parse_group(group).is_multicast:
            join(sock, group, interface, source)
    except OSError as error:
        raise UsageError(f"--group {group} --port {port} on {interface.name}: {error.strerror}") from error
    return sock


def percentiles(latency: Any) -> dict[str, float]:
    """Latency percentiles in microseconds from a histogram."""
    total = int(latency.sum())
    cumulative = np.cumsum(latency)
    return {
        f"p{p:g}": bucket_ns(int(np.searchsorted(cumulative, total * p / 100))) / 1000 for p in PERCENTILES if total
    }


def summarise(
    receiver: Receiver, destinations: list[tuple[str, int]], elapsed_s: float, expect: int | None
) -> dict[str, Any]:
    """Everything that was found, and whether it is all right."""
    totals = receiver.totals[0]
    flows = receiver.flows[receiver.flows["seen"] != 0]
    flows = np.sort(flows, order=("socket", "number"))
    lost = flows["lost_before"] + flows["last"] - flows["first"] + 1 - flows["run_unique"]
    datagrams = int(totals["datagrams"])
    summary: dict[str, Any] = {
        "datagrams": datagrams,
        "bytes": int(totals["bytes"]),
        "seconds": round(elapsed_s, 3),
        "flows": len(flows),
        "lost": int(lost.sum()),
        "duplicated": int(flows["duplicates"].sum()),
        "reordered": int(flows["reordered"].sum()),
        "corrupt": int(totals["corrupt"]),
        "foreign": int(totals["foreign"]),
        "short": int(totals["short"]),
        "dropped_by_receiver": int(receiver.overflows.sum()),
        "latency_us": {**percentiles(receiver.latency), "max": int(totals["latency_ns_max"]) / 1000},
        "per_flow": [
            {
                "destination": "{}:{}".format(*destinations[int(flow["socket"])]),
                "flow": int(flow["number"]),
                "datagrams": int(flow["datagrams"]),
                "lost": int(gone),
                "duplicated": int(flow["duplicates"]),
                "reordered": int(flow["reordered"]),
            }
            for flow, gone in zip(flows, lost, strict=True)
        ],
    }
    wrong = ("lost", "duplicated", "reordered", "corrupt", "foreign")
    summary["expected"] = expect
    is_whole = datagrams == expect if expect is not None else datagrams > 0  # nothing at all says nothing good
    summary["ok"] = not any(summary[key] for key in wrong) and is_whole
    return summary


def show(summary: dict[str, Any]) -> None:
    """The summary for people."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    keys = ("datagrams", "lost", "duplicated", "reordered", "corrupt", "foreign", "short")
    console.print("  ".join(f"{key} {summary[key]}" for key in keys))
    latency = summary["latency_us"]
    console.print("latency µs: " + "  ".join(f"{name} {value:,.1f}" for name, value in latency.items()))
    if summary["dropped_by_receiver"]:
        console.print(f"{summary['dropped_by_receiver']} dropped at this receiver's own socket: it was too slow")
    if not summary["datagrams"] and summary["expected"] is None:
        console.print("nothing came")
    if summary["expected"] not in (None, summary["datagrams"]):
        console.print(f"expected {summary['expected']} datagrams")
    if len(summary["per_flow"]) > 1:
        table = Table("destination", "flow", "datagrams", "lost", "duplicated", "reordered", box=None)
        for flow in summary["per_flow"][:FLOWS_SHOWN]:
            table.add_row(*(str(value) for value in flow.values()))
        console.print(table)
        if len(summary["per_flow"]) > FLOWS_SHOWN:
            console.print(f"… {len(summary['per_flow']) - FLOWS_SHOWN} more flows: see --json")
    console.print("[green]ok[/green]" if summary["ok"] else "[red]not ok[/red]")


def run(receiver: Receiver, ending: Ending, told: IO[str] | None, quiet: bool) -> float:
    """Receive until one of the endings; return the seconds from the first datagram to the last."""
    first_s = last_s = shown_s = time.monotonic()
    shown = 0
    while not ending.interrupted:
        present_s = time.monotonic()
        ending.look(told)
        total = int(receiver.totals[0]["datagrams"])
        if total >= ending.count or present_s >= ending.deadline_s:
            break
        if ending.is_idle(last_s if total else None, present_s):
            break
        if receive(receiver, POLL_MS, ROUNDS_MAX, ending.count):
            last_s = time.monotonic()
            if total == 0:
                first_s = last_s
        if not quiet and present_s - shown_s >= 1:
            pps = (total - shown) / (present_s - shown_s)
            click.echo(f"{present_s - first_s:6.1f} s  {total} received  {pps:,.0f} datagrams/s", err=True)
            shown, shown_s = total, present_s
    return max(last_s - first_s, 0.0)


@click.command(epilog="Example: recv_mcast.py --group 239.2.2.2 --port 6001 --expect 10000 --idle-timeout 2")
@click.option("--group", default="239.2.2.2", show_default=True, help="Multicast group, or an address of this host.")
@click.option("--port", type=int, default=6001, show_default=True)
@click.option("--interface", default="lo", show_default=True, help="Name or address.")
@click.option("--source", help="Join for this sender only.")
@click.option("--flows", type=click.IntRange(1, 16_384), default=1, show_default=True)
@click.option(
    "--flow-by",
    type=click.Choice(["source-port", "group", "port"]),
    default="source-port",
    show_default=True,
    help="As the sender's: groups or ports count up from the given ones.",
)
@click.option("--count", type=click.IntRange(1), help="Stop after so many datagrams.")
@click.option("--duration", type=click.FloatRange(0, min_open=True), help="Stop after so many seconds.")
@click.option("--idle-timeout", type=click.FloatRange(0, min_open=True), help="Stop after so many silent seconds.")
@click.option("--expect", type=click.IntRange(0), help="It is wrong when it is not so many datagrams.")
@click.option("--record", "record_path", type=click.Path(path_type=Path), help="Write payloads to this file.")
@click.option("--told", is_flag=True, help="A line on standard input tells how many datagrams were sent, and ends it.")
@click.option("--ready", is_flag=True, help="Print `ready` when joined.")
@click.option("--quiet", is_flag=True, help="No progress lines.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def main(
    group: str,
    port: int,
    interface: str,
    source: str | None,
    flows: int,
    flow_by: str,
    count: int | None,
    duration: float | None,
    idle_timeout: float | None,
    expect: int | None,
    record_path: Path | None,
    told: bool,
    ready: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Receive and check test traffic."""
    try:
        place = find_interface(interface)
        destinations = sorted(set(spread(group, port, flows, flow_by)))
        sockets = [open_socket(*destination, place, source) for destination in destinations]
    except UsageError as error:
        raise click.UsageError(str(error)) from None
    receiver = make_receiver([sock.fileno() for sock in sockets], RECORD_BYTES_MAX if record_path else 0)
    receive(receiver, 0, 0, 0)  # loads the compiled code
    ending = Ending(count or FOREVER, time.monotonic() + duration if duration else float("inf"), idle_timeout)

    def interrupt(*_: object) -> None:
        ending.interrupted = True

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, lambda *_: ending.drain(DRAIN_IDLE_S))
    if ready:
        click.echo("ready")
        sys.stdout.flush()
    elapsed_s = run(receiver, ending, sys.stdin if told else None, quiet)
    with contextlib.ExitStack() as stack:
        for sock in sockets:
            stack.enter_context(sock)
    if record_path is not None:
        record_path.write_bytes(receiver.record[: int(receiver.totals[0]["recorded"])].tobytes())
    summary = summarise(receiver, destinations, elapsed_s, expect)
    if as_json:
        click.echo(json.dumps(summary))
    else:
        show(summary)
    sys.exit(0 if summary["ok"] else 1)


if __name__ == "__main__":
    main()
