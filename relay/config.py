"""The configuration: the typed definition of a file, and options of it and the command line together. Pure.

Files are read in relay/configfile.py; docs/configuration.md is made of what stands here and in relay/ranges.py.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from logging_shm.sinks.selection import Selection, SinkError
from logging_shm.sinks.url import Described
from relay.conversion import faults
from relay.errors import ConfigError, UsageError
from relay.ranges import ConfiguredRule
from relay.rules import KeyPath, Rule, named, validate

INSTANCE = r"[A-Za-z0-9][A-Za-z0-9-]{0,23}"
RESERVED_INSTANCES = ("control", "dp", "supervisor", "controlplane")
LOG_LEVELS = ("emergency", "alert", "critical", "error", "warning", "notice", "info", "debug")
RUN_DIRECTORY = Path("/run/mcr")
RING_MIB_MAX = 1024
WORKERS_MAX = 64
CORE_MAX = 1023  # CPU_SETSIZE of sched.h less one

Level = Literal["emergency", "alert", "critical", "error", "warning", "notice", "info", "debug"]
FanoutMode = Literal["hash", "cpu", "qm"]
IdleMode = Literal["adaptive", "sleep", "spin"]
StreamHealth = Literal["off", "rtp", "full"]


HINTS: dict[KeyPath, str] = {
    ("socket_mode",): '; give octal digits such as "0660"',
    ("instance",): "; give 1 to 24 letters, digits and hyphens",
}


def _about(text: str) -> Meta:
    return Meta(description=text)


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What mcrd can be told. The file has the same keys; the command line goes before the file."""

    interfaces: Annotated[tuple[str, ...], _about("Interfaces to receive from: at least one, or --interface.")] = ()
    num_workers: Annotated[
        Annotated[int, Meta(ge=1, le=WORKERS_MAX)] | None,
        _about("Worker processes, each on a core of its own. None: one for each of `cores`, else 1."),
    ] = None
    cores: Annotated[
        str | None, _about('Cores of the workers, such as `"2,4-7"`. None: the first that the process may use.')
    ] = None
    user: Annotated[
        str | None, _about("Whom control plane and workers run as. None: the caller of sudo, else `nobody`.")
    ] = None
    group: Annotated[str | None, _about("Their group. None: the user's.")] = None
    instance: Annotated[
        Annotated[str, Meta(pattern=f"^{INSTANCE}$")] | None,
        _about("Name of this relay, to run several on a host: 1 to 24 letters, digits and hyphens."),
    ] = None
    socket: Annotated[
        str | None, _about("Control socket. None: `/run/mcr/control.sock`, or `/run/mcr/INSTANCE.sock`.")
    ] = None
    state: Annotated[
        str | None,
        _about("A file that keeps rules added at run time over restarts. None: they are kept until a clean stop."),
    ] = None
    socket_mode: Annotated[
        Annotated[str, Meta(pattern=r"\A0?[0-7]{3}\Z")] | None,
        _about('Who may connect, in octal digits. None: `"0660"` with a `socket_group`, else `"0666"`.'),
    ] = None
    socket_group: Annotated[
        str | None, _about("Owns the control socket, and its members may change things. None: no group may.")
    ] = None
    fanout: Annotated[FanoutMode, _about("How workers share traffic; `hash` keeps each flow in order.")] = "hash"
    exclusive: Annotated[bool, _about("Relayed datagrams stay away from the host's own stack.")] = False
    ring_mib: Annotated[
        int, Meta(ge=1, le=RING_MIB_MAX, description="Packet ring for each worker and interface, in MiB.")
    ] = 16
    idle: Annotated[IdleMode, _about("How workers wait for datagrams.")] = "adaptive"
    stream_health: Annotated[
        StreamHealth, _about("How far workers look into datagrams: not, RTP headers, MPEG-TS headers too.")
    ] = "full"
    log_level: Annotated[Level, _about("Least severity that is logged.")] = "info"
    log_format: Annotated[Literal["text", "json"], _about("How lines on stdout are written.")] = "text"
    log_timestamps: Annotated[bool, _about("Time before each line.")] = False
    log_fields: Annotated[bool, _about("Core, pid, tid, sequence number and pairs behind each line of text.")] = False
    log_to: Annotated[tuple[str, ...], _about("URLs of sinks, see logging.md. None given: stdout.")] = ()
    stats_interval_s: Annotated[int, Meta(ge=0, description="Seconds between stats lines in the log; 0: none.")] = 10


class Configuration(Options, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole file: the options, and the rules."""

    rules: Annotated[tuple[ConfiguredRule, ...], _about("The rules, as `[[rules]]` tables: see Rules.")] = ()


class Origin(msgspec.Struct, frozen=True):
    """Where options came from: the file, if there was one, and the names of those from the command line."""

    file: str | None = None
    command_line: tuple[str, ...] = ()


def validate_unnamed(rule: Rule) -> Rule:
    """Check a rule that may have no name yet. Raises RuleError."""
    validate(named(rule))
    return rule


def parse_cores(text: str) -> tuple[int, ...]:
    """Core numbers from a list such as `2,4-7`, in the order given. Raises ConfigError."""
    cores: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None:
            raise ConfigError(f"cores {text!r}: expected numbers and ranges such as 2,4-7")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last > CORE_MAX:
            raise ConfigError(f"cores {text!r}: {part.strip()} is no range of cores from 0 to {CORE_MAX}")
        cores += range(first, last + 1)
    if len(set(cores)) != len(cores):
        raise ConfigError(f"cores {text!r}: a core is given twice; each worker has a core of its own")
    return tuple(cores)


def check_instance(name: str) -> None:
    """Raises ConfigError for a name that the relay's own files have."""
    if name in RESERVED_INSTANCES:
        raise ConfigError(f"instance {name!r} is a reserved name: choose another")


def given(command_line: dict[str, Any]) -> dict[str, Any]:
    """Those options that the command line really has."""
    return {key: value for key, value in command_line.items() if value not in (None, ())}


def merge(file_options: dict[str, Any], command_line: dict[str, Any]) -> Options:
    """Options from both, the command line's before the file's. Raises ConfigError, UsageError."""
    together = {**file_options, **given(command_line)}
    for path, message in faults(together, Options):
        raise UsageError(f"command line: {path[0]}: {message}{HINTS.get(path, '')}")
    options = msgspec.convert(together, Options)
    options = msgspec.structs.replace(options, interfaces=tuple(dict.fromkeys(options.interfaces)))
    if not options.interfaces:
        raise UsageError("no interface: give --interface, or `interfaces` in the configuration")
    for key, check in CHECKS.items():
        if getattr(options, key):
            try:
                check(getattr(options, key))
            except ConfigError as error:
                raise (UsageError if key in given(command_line) else ConfigError)(str(error)) from None
    return options


def sinks(options: Options) -> list[Described]:
    """The log's sinks that the options ask for. Raises ConfigError."""
    defaults = Selection(timestamps=options.log_timestamps, fields=options.log_fields)
    try:
        return [Described(url, defaults, options.log_format) for url in options.log_to or ("stdout:",)]
    except SinkError as error:
        raise ConfigError(str(error)) from None


def check_sinks(urls: tuple[str, ...]) -> None:
    """Raises ConfigError for one that can't be."""
    sinks(Options(log_to=urls))


# What a value's type does not tell.
CHECKS: dict[str, Callable[[Any], object]] = {"cores": parse_cores, "log_to": check_sinks, "instance": check_instance}


def socket_path(options_socket: str | None, instance: str | None) -> Path:
    """Where the control socket is. Raises UsageError for an instance that can't be."""
    if instance is not None and re.fullmatch(INSTANCE, instance) is None:
        raise UsageError(f"instance {instance!r}{HINTS['instance',]}")
    if options_socket is not None:
        return Path(options_socket)
    return RUN_DIRECTORY / f"{instance or 'control'}.sock"
