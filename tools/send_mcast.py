#!/usr/bin/env python3
"""send_mcast: a generator of test traffic, evenly paced or as fast as the host can.

    python tools/send_mcast.py --group 239.1.1.1 --port 5001 --interface lo --rate 50000 --duration 10

Every datagram carries flow, sequence number, send time and a checksum; tools/recv_mcast.py checks them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools import environment

environment.enter()

import json
import secrets
import socket
import struct
import time
from typing import Any

import click
import numpy as np

from relay.dataplane.layout import UDP_PAYLOAD_MAX, UDP_SEGMENTS_MAX
from tools.addressing import (
    FAMILY,
    HEADER_BYTES,
    Interface,
    UsageError,
    find_interface,
    missing_route,
    parse_group,
    parse_rate,
    spread,
)
from tools.payload import HEADER_OFFSET, KINDS, template
from tools.sending import SLOT_BYTES, Sender, make_sender, send_until

PAUSE_NS = 200_000_000  # Ctrl-C and the progress line wait no longer
SINGLY_UP_TO_PPS = 20_000  # above, ticks come at most this often and send several datagrams each
SEND_BUFFER_BYTES = 16 << 20
SO_SNDBUFFORCE = 32
FOREVER = 1 << 62
SIZES_DRAWN = 65_521  # a prime, so that sizes and flows don't fall into step


def parse_sizes(text: str) -> Any:
    """Payload sizes in bytes, i8[n], from `1316` or `64-1400`. Raises UsageError."""
    first, _, last = text.partition("-")
    if not first.isdecimal() or (last and not last.isdecimal()):
        raise UsageError(f"--size {text}: expected bytes such as 1316, or a range such as 64-1400")
    low, high = int(first), int(last or first)
    if low > high or high > UDP_PAYLOAD_MAX:
        raise UsageError(f"--size {text}: from 0 to {UDP_PAYLOAD_MAX} bytes, the smaller one first")
    if low == high:
        return np.array([low])
    return np.random.default_rng(1).integers(low, high + 1, SIZES_DRAWN)


def open_sockets(destinations: list[tuple[str, int]], interface: Interface, ttl: int) -> list[socket.socket]:
    """One connected socket for each flow. Raises UsageError when the kernel refuses one."""
    sockets = []
    for address, port in destinations:
        group = parse_group(address)
        sock = socket.socket(FAMILY[group.version], socket.SOCK_DGRAM)
        if group.version == 6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, interface.index)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, ttl)
            if ttl != 1:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, ttl)
        else:
            mreqn = struct.pack("@4s4si", bytes(4), socket.inet_aton(interface.address), interface.index)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, mreqn)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, ttl)
            if ttl != 1:
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
        try:
            sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, SEND_BUFFER_BYTES)
        except PermissionError:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        try:
            sock.bind(interface.sockaddr(interface.address, 0))
            sock.connect(interface.sockaddr(address, port))
        except OSError as error:
            hint = missing_route(group, interface)
            raise UsageError(f"--group {address} on {interface.name}: {error.strerror}{hint}") from error
        sockets.append(sock)
    return sockets


def choose_per_tick(burst: int | None, rate: float, size_max: int) -> int:
    """Datagrams that leave back to back in one tick."""
    if burst is not None:
        return burst
    most = max(1, min(UDP_SEGMENTS_MAX, UDP_PAYLOAD_MAX // max(size_max, 1)))
    if rate == 0:
        return most
    return min(most, max(1, round(rate / SINGLY_UP_TO_PPS)))


def progress(sender: Sender, elapsed_s: float, since_s: float, before: tuple[int, int]) -> tuple[int, int]:
    """One line about the last second; return the counters it stands for."""
    datagrams, sent_bytes = int(sender.state[0]["datagrams"]), int(sender.state[0]["bytes"])
    pps = (datagrams - before[0]) / since_s
    mbps = (sent_bytes - before[1]) * 8 / since_s / 1e6
    click.echo(f"{elapsed_s:6.1f} s  {datagrams} sent  {pps:,.0f} datagrams/s  {mbps:,.1f} Mbit/s", err=True)
    return datagrams, sent_bytes


@click.command(epilog="Example: send_mcast.py --group 239.1.1.1 --port 5001 --rate 10Mbps --payload ts --duration 60")
@click.option(
    "--group", default="239.1.1.1", show_default=True, help="Multicast group or unicast address, IPv4 or IPv6."
)
@click.option("--port", type=int, default=5001, show_default=True)
@click.option("--interface", default="lo", show_default=True, help="Name or address.")
@click.option("--rate", default="1000", show_default=True, help="50000, 50kpps, 10Mbps, 2.5Gbit/s or max.")
@click.option("--size", default="1316", show_default=True, help="Payload bytes, or a range such as 64-1400.")
@click.option("--count", type=click.IntRange(1), help="Datagrams, of all flows together.")
@click.option("--duration", type=click.FloatRange(0, min_open=True), help="Seconds. [default: until Ctrl-C]")
@click.option("--flows", type=click.IntRange(1, 16_384), default=1, show_default=True)
@click.option(
    "--flow-by",
    type=click.Choice(["source-port", "group", "port"]),
    default="source-port",
    show_default=True,
    help="What tells flows apart: groups and ports count up from the given ones.",
)
@click.option("--ttl", type=click.IntRange(1, 255), default=1, show_default=True, help="Or hop limit.")
@click.option("--payload", type=click.Choice(list(KINDS)), default="seq", show_default=True)
@click.option("--burst", type=click.IntRange(1, UDP_SEGMENTS_MAX), help="Sent back to back. [default: by the rate]")
@click.option("--gso/--no-gso", default=True, help="Let the kernel cut bursts into datagrams. [default: gso]")
@click.option("--ready", is_flag=True, help="Print `ready` when about to send.")
@click.option("--quiet", is_flag=True, help="No progress lines.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def main(
    group: str,
    port: int,
    interface: str,
    rate: str,
    size: str,
    count: int | None,
    duration: float | None,
    flows: int,
    flow_by: str,
    ttl: int,
    payload: str,
    burst: int | None,
    gso: bool,
    ready: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Send test traffic that tools/recv_mcast.py can check."""
    try:
        version = parse_group(group).version
        place = find_interface(interface, version)
        sizes = parse_sizes(size)
        pps = parse_rate(rate, int(sizes.mean()))
        sockets = open_sockets(spread(group, port, flows, flow_by), place, ttl)
    except UsageError as error:
        raise click.UsageError(str(error)) from None
    kind = KINDS[payload]
    per_tick = choose_per_tick(burst, pps, int(sizes.max()))
    fits = gso and int(sizes.max()) <= place.mtu_bytes - HEADER_BYTES[version]
    sender = make_sender(
        [sock.fileno() for sock in sockets],
        sizes,
        template(kind, SLOT_BYTES, seed=1),
        pps,
        per_tick,
        count or FOREVER,
    )
    elapsed_s = run(sender, duration, per_tick, fits, kind, ready, quiet)
    report(sender, elapsed_s, as_json)
    sys.exit(1 if sender.state[0]["errors"] else 0)


def run(
    sender: Sender, duration_s: float | None, per_tick: int, gso: bool, kind: int, ready: bool, quiet: bool
) -> float:
    """Send everything; return the seconds it took. Ctrl-C ends it early."""
    number = secrets.randbits(32)
    arguments = (per_tick, gso, kind, HEADER_OFFSET[kind], number)
    send_until(sender, 0, 0, *arguments)  # loads the compiled code
    sender.state[0]["next_tick_ns"] = 0
    start_s = shown_s = time.monotonic()
    end_ns = int((start_s + duration_s) * 1e9) if duration_s else FOREVER
    before = (0, 0)
    try:
        if ready:
            click.echo("ready")
            sys.stdout.flush()
        while send_until(sender, end_ns, PAUSE_NS, *arguments) > 0 and time.monotonic_ns() < end_ns:
            present_s = time.monotonic()
            if not quiet and present_s - shown_s >= 1:
                before = progress(sender, present_s - start_s, present_s - shown_s, before)
                shown_s = present_s
    except KeyboardInterrupt:
        pass
    return time.monotonic() - start_s


def report(sender: Sender, elapsed_s: float, as_json: bool) -> None:
    """The summary."""
    state = sender.state[0]
    summary = {
        "datagrams": int(state["datagrams"]),
        "bytes": int(state["bytes"]),
        "seconds": round(elapsed_s, 3),
        "packets_per_second": round(int(state["datagrams"]) / elapsed_s),
        "bits_per_second": round(int(state["bytes"]) * 8 / elapsed_s),
        "errors": int(state["errors"]),
        "last_errno": int(state["last_errno"]),
    }
    if as_json:
        click.echo(json.dumps(summary))
        return
    click.echo(
        f"sent {summary['datagrams']} datagrams, {summary['bytes']} bytes in {summary['seconds']:.2f} s: "
        f"{summary['packets_per_second']:,} datagrams/s, {summary['bits_per_second'] / 1e6:,.1f} Mbit/s, "
        f"{summary['errors']} errors"
    )


if __name__ == "__main__":
    main()
