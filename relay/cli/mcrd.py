"""mcrd: the supervisor from the command line. Reads options, checks the machine, runs in the foreground."""

import os
import sys
from pathlib import Path
from typing import Any

import click

from relay import config, configfile, preflight
from relay.config import LOG_LEVELS, Options, Origin
from relay.errors import RelayError
from relay.privileges import resolve_user
from relay.rules import Rule, check_cycles, check_protected
from relay.supervisor.main import Supervisor
from relay.supervisor.state import check_state_place
from relay.version import VERSION
from relay.wording import counted

HELP = """Relay multicast: receive from packet rings, match rules, send again with io_uring.

Runs in the foreground until Ctrl-C or SIGTERM; SIGHUP reads the configuration's rules again.
"""


def load(path: Path | None, command_line: dict[str, Any]) -> tuple[Options, tuple[Rule, ...]]:
    """Options and rules from the file and the command line. Raises RelayError."""
    file_options, rules = configfile.read(path) if path is not None else ({}, ())
    options = config.merge(file_options, command_line)
    check_cycles(rules, {rule.rule_id: rule for rule in rules}, options.interfaces)
    check_protected(rules, options.interfaces)
    return options, rules


def open_standard_descriptors() -> None:
    """Put /dev/null where standard input, output or error was closed: no socket gets a number that texts go to."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest that is free: this one


@click.command(help=HELP, epilog="Example: mcrd --interface eth0 --interface eth1 --num-workers 2")
@click.option("--interface", "interfaces", multiple=True, metavar="IFACE", help="Receive here; repeatable.")
@click.option("--num-workers", type=int, help="Worker processes, each on a core of its own. [default: 1]")
@click.option("--cores", metavar="LIST", help="Cores of the workers, such as 2,4-7. [default: the first allowed]")
@click.option("--user", help="Whom control plane and workers run as. [default: the caller of sudo, else nobody]")
@click.option("--group", help="Their group. [default: the user's]")
@click.option("--config", "config_path", type=click.Path(path_type=Path), help="TOML file with options and rules.")
@click.option("--instance", metavar="NAME", help="Name of this relay, to run several on a host.")
@click.option("--socket", metavar="PATH", help="Control socket. [default: /run/mcr/control.sock]")
@click.option("--state", metavar="FILE", help="Keep rules added at run time here, for the next start.")
@click.option("--socket-mode", metavar="MODE", help="Who may connect. [default: 0666, 0660 with --socket-group]")
@click.option("--socket-group", metavar="NAME", help="Its members may change things, as root may. [default: none]")
@click.option("--fanout", type=click.Choice(["hash", "cpu", "qm"]), help="How workers share it. [default: hash]")
@click.option("--exclusive", is_flag=True, default=None, help="Only the relay gets what it relays: less CPU.")
@click.option("--ring-mib", type=int, help="Packet ring for each worker and interface. [default: 16]")
@click.option("--idle", type=click.Choice(["adaptive", "sleep", "spin"]), help="How workers wait. [default: adaptive]")
@click.option("--stream-health", type=click.Choice(["off", "rtp", "full"]), help="What is watched. [default: full]")
@click.option("--log-level", type=click.Choice(LOG_LEVELS), metavar="LEVEL", help="Least severity. [default: info]")
@click.option("--log-format", type=click.Choice(["text", "json"]), help="[default: text]")
@click.option("--log-timestamps", is_flag=True, default=None, help="Time before each line.")
@click.option("--log-fields", is_flag=True, default=None, help="Core, pid, sequence, pairs behind each line.")
@click.option("--log-to", multiple=True, metavar="URL", help="file:, syslog+udp:, journald: … [default: stdout:]")
@click.option("--stats-interval-s", type=int, help="Seconds between stats lines, 0 for none. [default: 10]")
@click.option("--check", is_flag=True, help="Check configuration and privileges; start nothing.")
@click.version_option(VERSION, prog_name="mcrd")
def main(config_path: Path | None, check: bool, **command_line: Any) -> None:
    """Start the relay; see HELP."""
    open_standard_descriptors()
    try:
        options, rules = load(config_path, command_line)
        owner = resolve_user(options.user, options.group)
        cores = preflight.check(options, owner)
        if check:
            check_state_place(options.state)
            counts = f"{counted(len(rules), 'rule')}, {counted(len(cores), 'worker')}"
            click.echo(f"ok: {counts} on {', '.join(options.interfaces)}")
            return
        origin = Origin(str(config_path.absolute()) if config_path else None, tuple(config.given(command_line)))
        supervisor = Supervisor(options, rules, cores, owner, lambda: load(config_path, command_line), origin)
        sys.exit(supervisor.run())
    except RelayError as error:
        click.echo(f"mcrd: {error}", err=True)
        sys.exit(error.exit_code)
