"""mcrctl: the control client. Each command is one request; --json prints the answer as it came."""

from pathlib import Path
from typing import get_args

import click
import msgspec

from relay import api
from relay.cli import completion, show
from relay.cli.capture.command import capture
from relay.cli.config import config
from relay.cli.doctor import doctor
from relay.cli.explain import explain
from relay.cli.options import json_option, reports_errors, tell_silence
from relay.cli.schema import schema
from relay.cli.telling import tell
from relay.cli.top.command import top
from relay.client import Client
from relay.config import LOG_LEVELS, socket_path
from relay.configfile import read
from relay.errors import ControlError, RuleError, UsageError
from relay.ranges import ConfiguredOutput, ConfiguredRule, ConfiguredSecondary, expand
from relay.rules import Protection, parse_ttl, split_output, split_secondary
from relay.version import VERSION
from relay.wording import counted


@click.group(epilog="Example: mcrctl add-rule --input-group 239.1.1.1 --input-port 5001 --output 239.2.2.2:6001:lo")
@click.option("--socket", metavar="PATH", help="Control socket. [default: /run/mcr/control.sock]")
@click.option("--instance", metavar="NAME", help="The relay's instance name.")
@click.version_option(VERSION, prog_name="mcrctl")
@click.pass_context
@reports_errors
def main(context: click.Context, socket: str | None, instance: str | None) -> None:
    """Talk to a running relay."""
    context.obj = socket_path(socket, instance)


main.add_command(config)
main.add_command(schema)


def _ask(request: api.Request, as_json: bool) -> api.Answer:
    """Ask; print warnings, and the result when it is wanted as JSON."""
    path: Path = click.get_current_context().obj
    with Client(path, on_silence=tell_silence) as client:
        answer = client.ask(request)
    for warning in answer.warnings:
        tell(f"warning: {warning}", err=True)
    if as_json:
        tell(msgspec.json.format(msgspec.json.encode(answer.result)).decode())
    return answer


def _single_output(
    group: str | None, port: str | None, interface: str | None, ttl: str | None, dscp: int | None
) -> list[ConfiguredOutput]:
    """The output that --output-group and its companions describe, if any. Raises RuleError, UsageError."""
    given = {"--output-group": group, "--output-port": port, "--output-interface": interface}
    if group is None and port is None and interface is None:
        if ttl is not None:
            raise UsageError("--ttl goes with --output-group: with --output, write G:P:I:TTL")
        return []
    missing = [name for name, value in given.items() if value is None]
    if missing or group is None or port is None or interface is None:
        raise UsageError(f"{', '.join(missing)} missing: an output has a group, a port and an interface")
    return [ConfiguredOutput(group, port, interface, parse_ttl(ttl) if ttl else None, dscp)]


def _secondary(text: str | None, source: str | None) -> ConfiguredSecondary | None:
    """The second input, if one is given. Raises RuleError."""
    if text is None and source is None:
        return None
    group, port, interface = split_secondary(text) if text is not None else (None, None, None)
    return ConfiguredSecondary(input_group=group, input_port=port, input_interface=interface, source=source)


@main.command("add-rule")
@click.option("--rule-id", metavar="ID", default="", help="With {group}, {port} or {n} for a range. [default: a hash]")
@click.option("--input-group", metavar="G", help="Multicast group, a unicast address of this host, or a range of them.")
@click.option("--input-port", metavar="P", help="A UDP port, or a range such as 5000-5099.")
@click.option("--input-interface", metavar="I", help="[default: every interface of the relay]")
@click.option("--source", metavar="S", help="Only datagrams of this sender.")
@click.option("--output-group", metavar="G", help="Multicast group or unicast address.")
@click.option("--output-port", metavar="P", help="UDP port.")
@click.option("--output-interface", metavar="I", help="It leaves here.")
@click.option("--ttl", metavar="N|decrement", help="[default: 1 for multicast]")
@click.option("--dscp", type=int, metavar="N", help="0 to 63. [default: 0]")
@click.option("--output", "outputs", multiple=True, metavar="G:P:I[:TTL]", help="An output; repeatable.")
@click.option("--preserve-source", is_flag=True, help="Send from the original source address.")
@click.option("--stall-ms", type=int, metavar="N", help="Tell when a sender is silent for longer.")
@click.option("--max-pps", type=int, metavar="N", help="Drop what is over N datagrams a second. [default: no limit]")
@click.option("--max-bps", type=int, metavar="N", help="Drop what is over N bits of payload a second.")
@click.option("--secondary", metavar="G:P[:I]", help="The same comes in here, too; ::I for an interface alone.")
@click.option("--secondary-source", metavar="S", help="The sender of what comes in there. [default: as --source]")
@click.option("--protection", type=click.Choice(get_args(Protection)), help="How the two become one.")
@click.option("--replace", is_flag=True, help="Change the rule of this id.")
@click.option("--file", "file", type=click.Path(path_type=Path), help="Add the rules of a TOML file, all or none.")
@json_option
@reports_errors
def add_rule(
    rule_id: str,
    input_group: str | None,
    input_port: str | None,
    input_interface: str | None,
    source: str | None,
    output_group: str | None,
    output_port: str | None,
    output_interface: str | None,
    ttl: str | None,
    dscp: int | None,
    outputs: tuple[str, ...],
    preserve_source: bool,
    stall_ms: int | None,
    max_pps: int | None,
    max_bps: int | None,
    secondary: str | None,
    secondary_source: str | None,
    protection: Protection | None,
    replace: bool,
    file: Path | None,
    as_json: bool,
) -> None:
    """Add a rule, or several from ranges or a file."""
    if file is not None:
        _, rules = read(file)
    else:
        if input_group is None or input_port is None:
            raise UsageError("--input-group and --input-port are needed, or --file")
        try:
            wanted = _single_output(output_group, output_port, output_interface, ttl, dscp)
            wanted += [ConfiguredOutput(*split_output(text), dscp) for text in outputs]
        except RuleError as error:
            raise UsageError(str(error)) from None
        if not wanted:
            raise UsageError("no output: give --output G:P:I, or --output-group, --output-port and --output-interface")
        entry = ConfiguredRule(
            rule_id=rule_id,
            input_group=input_group,
            input_port=input_port,
            outputs=tuple(wanted),
            input_interface=input_interface,
            source=source,
            preserve_source=preserve_source,
            stall_ms=stall_ms,
            max_pps=max_pps,
            max_bps=max_bps,
            secondary=_secondary(secondary, secondary_source),
            protection=protection,
        )
        rules, wrong = expand(entry)
        for _, reason in wrong[:1]:
            raise UsageError(reason)
    answer = _ask(api.AddRules(rules, replace), as_json)
    if not as_json:
        became = dict.fromkeys(answer.result["unchanged"], "unchanged")
        became |= dict.fromkeys(answer.result.get("replaced", ()), "replaced")  # earlier versions do not tell
        for rule in answer.result["rule_ids"]:
            tell(f"rule {rule} {became.get(rule, 'added')}")


@main.command("remove-rule")
@click.argument("rule_ids", metavar="ID…", nargs=-1, required=True, shell_complete=completion.rule_ids)
@json_option
@reports_errors
def remove_rule(rule_ids: tuple[str, ...], as_json: bool) -> None:
    """Remove rules, all or none."""
    _ask(api.RemoveRules(rule_ids), as_json)
    if not as_json:
        for rule_id in rule_ids:
            tell(f"rule {rule_id} removed")


@main.command("list-rules")
@json_option
@reports_errors
def list_rules(as_json: bool) -> None:
    """The active rules."""
    answer = _ask(api.ListRules(), as_json)
    if not as_json:
        show.rules(answer.result)


@main.command("get-stats")
@json_option
@reports_errors
def get_stats(as_json: bool) -> None:
    """Totals since the start, and rates over the last second."""
    answer = _ask(api.GetStats(), as_json)
    if not as_json:
        show.stats(answer.result)


@main.command("streams")
@click.argument("rule_id", metavar="[RULE]", required=False)
@json_option
@reports_errors
def streams(rule_id: str | None, as_json: bool) -> None:
    """What each rule's senders send, and how well it arrives."""
    answer = _ask(api.GetStats(), as_json=False)
    found = {rule["rule_id"]: rule.get("streams", []) for rule in answer.result["rules"]}
    if rule_id is not None:
        if rule_id not in found:
            raise ControlError(f"no rule {rule_id}: `mcrctl list-rules` shows those there are")
        found = {rule_id: found[rule_id]}
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(found)).decode())
    else:
        show.streams(found)


@main.command("list-workers")
@json_option
@reports_errors
def list_workers(as_json: bool) -> None:
    """The workers."""
    answer = _ask(api.ListWorkers(), as_json)
    if not as_json:
        show.workers(answer.result)


@main.command("ping")
@json_option
@reports_errors
def ping(as_json: bool) -> None:
    """Whether the relay answers."""
    answer = _ask(api.Ping(), as_json)
    if not as_json:
        click.echo(f"mcrd {answer.result['version']} answers")


main.command("explain")(json_option(reports_errors(explain)))
main.command("doctor")(json_option(reports_errors(doctor)))


@main.command("restart")
@click.option("--graceful", is_flag=True, expose_value=False, help="Said for clarity: there is no other way.")
@click.pass_context
@reports_errors
def restart(context: click.Context) -> None:
    """Start the relay anew, as after an upgrade. Its sockets and rules stay, and no datagram is lost."""
    with Client(context.obj, on_silence=tell_silence) as client:
        replaced = client.restart()
    tell(f"restarted: {counted(replaced, 'worker')} replaced")


@main.command("metrics")
@click.option("--listen", metavar="ADDRESS:PORT|unix:PATH", help="Serve over HTTP. [default: 127.0.0.1:9464]")
@click.option("--once", is_flag=True, help="Print them once instead, for a textfile collector.")
@click.pass_context
@reports_errors
def metrics(context: click.Context, listen: str | None, once: bool) -> None:
    """Serve the relay's metrics to Prometheus, in the foreground, over restarts of the relay."""
    from relay.cli import metrics  # prometheus_client is slow to load

    if once:
        metrics.print_once(context.obj)
    else:
        metrics.serve(context.obj, listen or "127.0.0.1:9464")


@main.command("completion")
@click.argument("shell", type=click.Choice(completion.SHELLS))
@click.option("--program", type=click.Choice(list(completion.PROGRAMS)), default="mcrctl", help="[default: mcrctl]")
def print_completion(shell: str, program: str) -> None:
    """Print a shell's completion script, such as for: source <(mcrctl completion bash)"""
    click.echo(completion.script(shell, program), nl=False)


@main.group("log-level")
def log_level() -> None:
    """Which severities are logged."""


def _show_levels(request: api.LogLevel, as_json: bool) -> None:
    answer = _ask(request, as_json)
    if not as_json:
        for name, level in answer.result.items():
            tell(f"{name}: {level}")


@log_level.command("get")
@click.option("--facility", help="Only this one, such as Ingress.")
@click.option("--core", type=int, help="Only this worker's.")
@json_option
@reports_errors
def log_level_get(facility: str | None, core: int | None, as_json: bool) -> None:
    """The level of each ring."""
    _show_levels(api.LogLevel(None, facility, core), as_json)


@log_level.command("set")
@click.argument("level", type=click.Choice(LOG_LEVELS))
@click.option("--facility", help="Only this one, such as Ingress.")
@click.option("--core", type=int, help="Only this worker's.")
@json_option
@reports_errors
def log_level_set(level: str, facility: str | None, core: int | None, as_json: bool) -> None:
    """Log records as grave as LEVEL or graver."""
    _show_levels(api.LogLevel(level, facility, core), as_json)


main.command("top")(reports_errors(top))
main.command("capture")(reports_errors(capture))
