"""`mcrctl explain`: what the running relay would do with a datagram. Gathers the facts; explaining/ judges."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from relay.cli import host, running
from relay.cli.host import Files
from relay.errors import RelayError, UsageError
from relay.rules import PORT_MAX, TTL_MAX, address_number

if TYPE_CHECKING:  # loads NumPy: only the command itself needs it, not all the others
    from relay.cli.explaining.facts import Explanation, Facts

DEFAULT_TTL = 64  # IPDEFTTL, linux/ip.h


def parse_endpoint(text: str, what: str, needs_port: bool) -> tuple[str, int | None]:
    """Read `ADDRESS:PORT`. Raises UsageError."""
    address, colon, port = text.partition(":")
    try:
        address_number(address)
    except OSError:
        raise UsageError(f"{what} {text!r}: {address!r} is not an IPv4 address such as 239.1.1.1") from None
    if address.count(".") != 3:
        raise UsageError(f"{what} {text!r}: {address!r} is not an IPv4 address such as 239.1.1.1")
    if not colon and not needs_port:
        return address, None
    if not port.isdecimal() or not 1 <= int(port) <= PORT_MAX:
        raise UsageError(f"{what} {text!r}: give a port from 1 to {PORT_MAX} behind a colon")
    return address, int(port)


@click.argument("source", metavar="SOURCE[:PORT]")
@click.argument("destination", metavar="GROUP:PORT")
@click.option("--interface", metavar="I", help="Where it comes in. [default: the one in whose network SOURCE is]")
@click.option("--ttl", type=click.IntRange(1, TTL_MAX), metavar="N", help="The TTL that it comes with.")
def explain(source: str, destination: str, interface: str | None, ttl: int | None, as_json: bool) -> None:
    """What would happen to a datagram from SOURCE to GROUP:PORT, step by step.

    Exit status 0 when it would be relayed, 1 when not. Example: mcrctl explain 10.0.0.7 239.1.1.1:5000
    """
    path: Path = click.get_current_context().obj
    explanation = _explain(path, source, destination, interface, ttl)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(explanation)).decode())
    else:
        show(explanation)
    sys.exit(0 if explanation.relayed else 1)


def _explain(path: Path, source: str, destination: str, interface: str | None, ttl: int | None) -> "Explanation":
    """Raises RelayError."""
    from relay.cli.explaining import explanation, way_in
    from relay.cli.explaining.facts import Datagram

    address, source_port = parse_endpoint(source, "source", needs_port=False)
    group, port = parse_endpoint(destination, "destination", needs_port=True)
    assert port is not None
    relay = running.ask(path, Files())
    if (refused := running.enter_network_of(relay.pid)) is not None:
        click.echo(f"warning: {refused}", err=True)
    facts = gather(relay, Files())
    assumed = None
    if interface is None:
        interface, assumed = way_in.likely_interface(address, networks(), list(facts.plan.rings))
        if interface is None:
            raise RelayError("the relay takes in from no interface that exists: give --interface")
    return explanation.explain(facts, Datagram(address, source_port, group, port, interface, ttl, assumed))


def networks() -> dict[str, list[tuple[str, str]]]:
    """IPv4 addresses with their netmasks, by interface."""
    import socket

    import psutil

    return {
        name: [(a.address, a.netmask) for a in addresses if a.family == socket.AF_INET and a.netmask]
        for name, addresses in psutil.net_if_addrs().items()
    }


def gather(relay: running.Running, files: Files) -> "Facts":
    """The facts of the network namespace that this process is in. Raises RuleError."""
    from relay.cli.explaining.facts import Facts
    from relay.supervisor.interfaces import snapshot
    from relay.supervisor.plan import make_plan

    interfaces = snapshot()
    inodes = running.socket_inodes(relay.pid) if relay.has_private_view else None
    igmp = files.text("proc/net/igmp")
    return Facts(
        plan=make_plan(relay.rules, interfaces, relay.interfaces),
        interfaces=interfaces,
        flags={name: flags for name in interfaces if (flags := files.interface(name, "flags")) is not None},
        has_carrier={name: files.interface(name, "carrier") != 0 for name in interfaces},
        joined=None if igmp is None else host.joined(igmp),
        source_filters=host.source_filters(files.text("proc/net/mcfilter") or ""),
        sockets=tuple(host.udp_sockets(files.text("proc/net/udp") or "")),
        own_inodes=None if inodes is None else frozenset(inodes),
        memberships_max=files.setting("net/ipv4/igmp_max_memberships"),
        ttl_default=files.setting("net/ipv4/ip_default_ttl") or DEFAULT_TTL,
        rule_stats={rule["rule_id"]: rule for rule in relay.stats["rules"]},
        workers=relay.stats["workers"],
    )


def show(explanation: "Explanation") -> None:
    """The steps for people, then what they come to."""
    width = max(len(step.step) for step in explanation.steps)
    for step in explanation.steps:
        click.echo(f"{step.verdict:5} {step.step:{width}}  {step.reason}")
        if step.remedy:
            click.echo(f"{'':{width + 8}}remedy: {step.remedy}")
    click.echo(f"{explanation.source} to {explanation.destination} on {explanation.interface} {explanation.summary}")
