"""The configuration: typed options from a TOML file and the command line. Pure but for reading the file.

Every error names the file, the line, the key and what is allowed.
"""

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
from msgspec import Meta

from logging_shm.sinks.selection import Selection, SinkError
from logging_shm.sinks.url import Described
from relay.errors import ConfigError, RuleError
from relay.rules import Output, Rule, named, parse_output, validate

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


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What mcrd can be told. The file has the same keys."""

    interfaces: tuple[str, ...] = ()
    num_workers: Annotated[int, Meta(ge=1, le=WORKERS_MAX)] | None = None  # None: one for each of `cores`, else 1
    cores: str | None = None  # "2,4-7"; None: those that the process may use
    user: str | None = None
    group: str | None = None
    instance: Annotated[str, Meta(pattern=f"^{INSTANCE}$")] | None = None
    socket: str | None = None
    state: str | None = None  # a file that keeps rules added at run time over restarts; None: until a clean stop
    socket_mode: Annotated[str, Meta(pattern=r"\A0?[0-7]{3}\Z")] | None = None  # None: 0660 with a group, else 0666
    socket_group: str | None = None  # owns the control socket, and its members may change things
    fanout: FanoutMode = "hash"
    exclusive: bool = False  # relayed datagrams stay away from the host's own stack
    ring_mib: Annotated[int, Meta(ge=1, le=RING_MIB_MAX)] = 16
    idle: IdleMode = "adaptive"
    stream_health: StreamHealth = "full"  # how far workers look into datagrams: not, RTP headers, MPEG-TS headers too
    log_level: Level = "info"
    log_format: Literal["text", "json"] = "text"
    log_timestamps: bool = False
    log_fields: bool = False  # core, pid, tid, sequence number and pairs behind each line of text
    log_to: tuple[str, ...] = ()  # URLs of sinks; none: stdout
    stats_interval_s: Annotated[int, Meta(ge=0)] = 10  # 0: no stats lines


class ConfiguredRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A rule as the file has it: outputs also as `group:port:interface[:ttl]`."""

    rule_id: str = ""
    input_group: str
    input_port: int
    outputs: tuple[Output | str, ...]
    input_interface: str | None = None
    source: str | None = None
    preserve_source: bool = False
    stall_ms: int | None = None

    def to_rule(self) -> Rule:
        """The rule, checked and named. Raises RuleError."""
        outputs = tuple(parse_output(o) if isinstance(o, str) else o for o in self.outputs)
        fields = {name: getattr(self, name) for name in self.__struct_fields__}
        return named(validate_unnamed(Rule(**{**fields, "outputs": outputs})))


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


def _key_lines(text: str) -> dict[tuple[str, int, str], int]:
    """The line of every key by table, index of that table and key; a table itself has the key ""."""
    lines: dict[tuple[str, int, str], int] = {}
    table, counts = "", {"": 0}
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*\[\[?\s*([\w-]+)\s*\]\]?", line)
        key = re.match(r"\s*\"?([\w-]+)\"?\s*=", line)
        if header:
            table = header[1]
            counts[table] = counts.get(table, -1) + 1
            lines[table, counts[table], ""] = number
        elif key:
            lines.setdefault((table, counts[table], key[1]), number)
    return lines


def line_of(text: str, path: str) -> int | None:
    """The line of a TOML text where the key of a msgspec error path such as `$.rules[1].ttl` stands."""
    lines = _key_lines(text)
    match = re.match(r"\$\.(\w+)(?:\[(\d+)\])?(?:\.(\w+))?", path)
    if match is None:
        return None
    name, index, key = match[1], int(match[2] or 0), match[3] or ""
    return lines.get((name, index, key)) or lines.get((name, index, "")) or lines.get(("", 0, name))


def _allowed(path: str) -> str:
    """The values that an option allows, when they are a list of words."""
    annotation = Options.__annotations__.get(path.removeprefix("$."))
    words = get_args(annotation) if get_origin(annotation) is Literal else ()
    if path == "$.socket_mode":
        return '; give octal digits such as "0660"'
    return f"; allowed are {', '.join(words)}" if words else ""


def _explain(error: msgspec.ValidationError, text: str, where: str) -> ConfigError:
    message, _, path = str(error).partition(" - at `")
    path = path.rstrip("`") or "$"
    unknown = re.search(r"unknown field `([^`]+)`", message)
    if unknown:
        of_rule = path.startswith("$.rules")
        known = ConfiguredRule.__struct_fields__ if of_rule else (*Options.__struct_fields__, "rules")
        path = f"{path}.{unknown[1]}"
        message = f"unknown key; allowed are {', '.join(known)}"
    line = line_of(text, path)
    at = f"{where}:{line}" if line else where
    return ConfigError(f"{at}: {path.removeprefix('$.')}: {message}{_allowed(path)}")


def read(path: Path) -> tuple[dict[str, Any], tuple[Rule, ...]]:
    """The options that a file sets, by name, and its rules. Raises ConfigError."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}: give a readable file with --config") from None
    return parse(text, str(path))


def parse(text: str, where: str) -> tuple[dict[str, Any], tuple[Rule, ...]]:
    """As `read`, of a text; `where` names it in errors."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where}: {error}") from None
    given = {key: value for key, value in document.items() if key != "rules"}
    try:
        options = msgspec.convert(given, Options)
    except msgspec.ValidationError as error:
        raise _explain(error, text, where) from None
    rules = _rules(document.get("rules", []), text, where)
    return {key: getattr(options, key) for key in given}, rules


def _rules(tables: Any, text: str, where: str) -> tuple[Rule, ...]:
    try:
        configured = msgspec.convert({"rules": tables}, dict[str, tuple[ConfiguredRule, ...]])["rules"]
    except msgspec.ValidationError as error:
        # The path of a value in a dict reads `$[...]`.
        explained = msgspec.ValidationError(str(error).replace("$[...]", "$.rules"))
        raise _explain(explained, text, where) from None
    rules: dict[str, Rule] = {}
    for index, rule in enumerate(configured):
        try:
            checked = rule.to_rule()
            if checked.rule_id in rules:
                raise RuleError(f"rule id {checked.rule_id} is given twice")
        except RuleError as error:
            line = line_of(text, f"$.rules[{index}]")
            raise ConfigError(f"{where}:{line}: rules[{index}]: {error}") from None
        rules[checked.rule_id] = checked
    return tuple(rules.values())


def merge(file_options: dict[str, Any], command_line: dict[str, Any]) -> Options:
    """Options from both, the command line's before the file's. Raises ConfigError."""
    given = {key: value for key, value in command_line.items() if value not in (None, ())}
    try:
        options = msgspec.convert({**file_options, **given}, Options)
    except msgspec.ValidationError as error:
        raise _explain(error, "", "command line") from None
    if not options.interfaces:
        raise ConfigError("no interface: give --interface, or `interfaces` in the configuration")
    if options.instance in RESERVED_INSTANCES:
        raise ConfigError(f"instance {options.instance!r} is a reserved name: choose another")
    sinks(options)
    return options


def sinks(options: Options) -> list[Described]:
    """The log's sinks that the options ask for. Raises ConfigError."""
    defaults = Selection(timestamps=options.log_timestamps, fields=options.log_fields)
    try:
        return [Described(url, defaults, options.log_format) for url in options.log_to or ("stdout:",)]
    except SinkError as error:
        raise ConfigError(str(error)) from None


def socket_path(options_socket: str | None, instance: str | None) -> Path:
    """Where the control socket is."""
    if options_socket is not None:
        return Path(options_socket)
    return RUN_DIRECTORY / f"{instance or 'control'}.sock"
