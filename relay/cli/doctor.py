"""`mcrctl doctor`: looks at the host and the running relay twice, has every check judge, and shows what they found."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from relay.cli import running
from relay.cli.host import IFF_LOOPBACK, IFF_MULTICAST, IFF_UP, Files
from relay.errors import UnreachableError

if TYPE_CHECKING:  # loads NumPy: only the command itself needs it, not all the others
    from relay.cli.checks.registry import Finding
    from relay.cli.checks.situation import Situation


@click.option("--interface", "interfaces", multiple=True, metavar="I", help="Look at this one, too; repeatable.")
@click.option(
    "--seconds",
    type=click.FloatRange(0.1, 3600),
    default=1.0,
    show_default=True,
    metavar="S",
    help="For how long to see which drops grow, and who sends IGMP and MLD queries, which come every 125 s.",
)
@click.option("--verbose", is_flag=True, help="Also what was read, and why it matters, where all is well.")
def doctor(interfaces: tuple[str, ...], seconds: float, verbose: bool, as_json: bool) -> None:
    """Check this host and the running relay: what is wrong, why it matters, and what helps.

    Without a relay the host alone is checked. Exit status 1 when there is a problem, 0 without; notes and warnings are
    none.
    """
    from relay.cli.checks import registry

    findings = registry.run(look(click.get_current_context().obj, interfaces, seconds))
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(findings)).decode())
    else:
        show(findings, verbose)
    sys.exit(1 if any(finding.severity == "problem" for finding in findings) else 0)


def look(path: Path, interfaces: tuple[str, ...], seconds: float) -> "Situation":
    """Look twice, `seconds` apart. Raises RelayError when a relay answers with a refusal."""
    from relay.cli.checks import cores, host, ipv6, network, relay  # noqa: F401 - they register themselves
    from relay.cli.checks.probes import hear_queriers, probe
    from relay.cli.checks.situation import Situation, count
    from relay.supervisor.interfaces import snapshot
    from relay.supervisor.plan import Plan, make_plan

    files = Files()
    earlier, silence = _ask(path, files)
    if earlier is not None and (refused := running.enter_network_of(earlier.pid)) is not None:
        click.echo(f"warning: {refused}", err=True)
    counters = count(files)
    queriers = hear_queriers(seconds)
    now, silence = _ask(path, files) if earlier is not None else (None, silence)
    present = snapshot()
    plan = make_plan(now.rules, present, now.interfaces) if now is not None else Plan()
    taken = dict.fromkeys((*interfaces, *(now.interfaces if now is not None else ()), *plan.rings))
    ingress = tuple(taken) or tuple(name for name in present if _could_be_relayed(files, name))
    return Situation(
        files=files,
        interfaces=present,
        ingress=ingress,
        probes=probe(now, ingress, queriers),
        interval_s=seconds,
        earlier=counters,
        relay=now,
        silence=silence,
        relay_earlier=earlier,
        plan=plan,
    )


def _ask(path: Path, files: Files) -> tuple[running.Running | None, str]:
    """The relay, or why there is none."""
    try:
        return running.ask(path, files), ""
    except UnreachableError as error:
        return None, str(error).partition(": start one")[0].partition(": if its mcrd")[0]


def _could_be_relayed(files: Files, name: str) -> bool:
    """Without a relay: what is up and not the loopback."""
    flags = files.interface(name, "flags") or 0
    return bool(flags & IFF_UP and flags & IFF_MULTICAST and not flags & IFF_LOOPBACK)


def show(findings: "list[Finding]", verbose: bool) -> None:
    """The gravest first; what is well in a line each."""
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        click.echo(f"{finding.severity:8} {finding.check:{width}}  {finding.finding}")
        if finding.severity != "ok" or verbose:
            for name, text in (("read", finding.read), ("why", finding.why), ("remedy", finding.remedy)):
                if text:
                    click.echo(f"{'':{width + 11}}{name}: {text}")
    severities = [finding.severity for finding in findings]
    counts = [f"{severities.count(severity)} {severity}" for severity in ("problem", "warning", "note", "ok")]
    click.echo(", ".join(counts))
