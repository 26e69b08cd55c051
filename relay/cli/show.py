"""Answers as tables for people. Pure but for printing."""

from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from relay.protection import LEG_NAMES
from relay.rules import Rule, legs

SHOWN_OUTPUTS_MAX = 3
LATENCY_COLUMNS = ("p50", "p90", "p99", "p99.9", "p99.99", "max")
TS_TROUBLE = (
    "sync_byte_errors",
    "sync_losses",
    "transport_errors",
    "continuity_errors",
    "pcr_gaps",
    "pcr_discontinuities",
    "pat_gaps",
)


def _console() -> Console:
    # A pipe has no width: rows stay whole for grep.
    console = Console(soft_wrap=False, highlight=False)
    return console if console.is_terminal else Console(width=200, highlight=False)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        numeric = column.endswith(
            ("/s", "packets", "matched", "relayed", "dropped", "in", "pid", "core", "µs", "silent", "jitter", "max")
        )
        table.add_column(column, justify="right" if numeric else "left", no_wrap=column != "outputs")
    return table


def si(value: float) -> str:
    """A rate in its best unit."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.2f} {unit}"
    return f"{value:.0f}"


def _drops(drops: dict[str, int]) -> str:
    return ", ".join(f"{cause} {count}" for cause, count in drops.items() if count) or "none"


def _rings(worker: dict[str, Any]) -> str:
    """How full each ring of a worker is; an earlier version does not tell."""
    return ", ".join(f"{name} {percent} %" for name, percent in worker.get("ring_fill_percent", {}).items())


def _fullest(workers: list[dict[str, Any]]) -> str:
    """How full the fullest ring is, and whose it is."""
    fills = [
        (percent, worker["core"], name)
        for worker in workers
        for name, percent in worker.get("ring_fill_percent", {}).items()
    ]
    if not fills:
        return "none"
    percent, core, name = max(fills, key=lambda fill: fill[0])
    return f"{percent} % full at most" + (f" ({name}, core {core})" if percent else "")


def _outputs(rule: dict[str, Any]) -> str:
    names = []
    for output in rule["outputs"]:
        ttl = f":{output['ttl']}" if output["ttl"] is not None else ""
        names.append(f"{output['group']}:{output['port']}:{output['interface']}{ttl}")
    more = f" and {len(names) - SHOWN_OUTPUTS_MAX} more" if len(names) > SHOWN_OUTPUTS_MAX else ""
    return " ".join(names[:SHOWN_OUTPUTS_MAX]) + more


def _second(rule: dict[str, Any]) -> str:
    """What is behind a rule's input in a list: its second leg, if there is one."""
    if not rule.get("secondary"):
        return ""
    known = {name: rule[name] for name in Rule.__struct_fields__ if name in rule}
    return f" and {legs(msgspec.convert(known, Rule))[1]}, {rule['protection']}"


def rules(result: list[dict[str, Any]]) -> None:
    """A line for each rule."""
    table = _table("rule", "input", "interface", "source", "outputs", "state")
    for rule in result:
        table.add_row(
            rule["rule_id"],
            f"{rule['input_group']}:{rule['input_port']}{_second(rule)}",
            rule["input_interface"] or "any",
            rule["source"] or "any",
            _outputs(rule),
            rule["state"],
        )
    _console().print(table if result else "no rules")


def stats(result: dict[str, Any]) -> None:
    """Totals, then a line for each rule."""
    console = _console()
    console.print(
        f"up {result['uptime_s']:.0f} s   in {result['packets_in']}   matched {result['packets_matched']}   "
        f"relayed {result['packets_relayed']}   {si(result['packets_per_second'])} packets/s   "
        f"{si(result['bits_per_second'])} bit/s"
    )
    withheld = f"   withheld {result['packets_withheld']}" if result.get("packets_withheld") else ""
    console.print(f"dropped: {_drops(result['drops'])}{withheld}")
    console.print(f"rings: {_fullest(result['workers'])}")
    table = _table("rule", "matched", "relayed", "dropped", "packets/s", "bit/s", "state")
    for rule in result["rules"]:
        table.add_row(
            rule["rule_id"],
            str(rule["packets_matched"]),
            str(rule["packets_relayed"]),
            str(sum(sum(part.get("drops", {}).values()) for part in (rule, *rule["outputs"]))),
            si(rule["packets_per_second"]),
            si(rule["bits_per_second"]),
            rule["state"],
        )
    if result["rules"]:
        console.print(table)
    _legs(console, result["rules"])
    _latency(console, result["workers"])


def _legs(console: Console, rules: list[dict[str, Any]]) -> None:
    """Two lines for each protected rule."""
    table = _table("rule", "leg", "input", "packets", "first packets", "missing packets", "silent", "state")
    for rule in rules:
        protection = rule.get("protection")
        if protection is None:
            continue
        for name, leg in zip(LEG_NAMES, protection["legs"], strict=False):
            silent, missing = leg["silent_ms"], leg["missing"]
            table.add_row(
                rule["rule_id"],
                name,
                leg["input"],
                str(leg["packets"]),
                str(leg["firsts"]),
                "" if missing is None else str(missing),
                "" if silent is None else _duration(silent),
                _leg_state(protection, name, leg),
            )
    if table.row_count:
        console.print(table)


def _leg_state(protection: dict[str, Any], name: str, leg: dict[str, Any]) -> str:
    if not leg["delivers"]:
        return "silent" if leg["packets"] else "nothing came"
    if protection["mode"] == "seamless":
        return "merged"
    return "relayed" if protection["active"] == name else "stands by"


def _latency(console: Console, workers: list[dict[str, Any]]) -> None:
    """A line for each worker that has relayed something."""
    table = _table("core", *(f"{name} µs" for name in LATENCY_COLUMNS))
    for worker in workers:
        latency = worker.get("latency")
        if latency is not None:
            values = (latency[f"{name.replace('.', '_')}_us"] for name in LATENCY_COLUMNS)
            table.add_row(str(worker["core"]), *(f"{value:.1f}" for value in values))
    if table.row_count:
        console.print(table)


def _trouble(stream: dict[str, Any]) -> str:
    """What is wrong with a stream, in words: counts that should be 0."""
    counts = {"malformed": stream["malformed"]}
    for name in ("lost", "reordered", "duplicates", "ssrc_changes", "sequence_restarts"):
        counts[name] = stream["rtp"][name] if stream["rtp"] else 0
    for name in (*TS_TROUBLE, "packets_untracked"):
        counts[name] = stream["mpeg_ts"][name] if stream["mpeg_ts"] else 0
    return ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items() if count) or "none"


def _duration(duration_ms: float) -> str:
    return f"{duration_ms:.0f} ms" if duration_ms < 10_000 else f"{duration_ms / 1000:.0f} s"


def streams(result: dict[str, list[dict[str, Any]]]) -> None:
    """A line for each stream of each rule."""
    table = _table(
        "rule", "source", "interface", "payload", "packets", "silent", "jitter", "gap max", "TS bit/s", "errors"
    )
    for rule_id, found in result.items():
        for stream in found:
            rtp, mpeg_ts = stream["rtp"], stream["mpeg_ts"]
            table.add_row(
                rule_id,
                stream["source"],
                stream["interface"],
                stream["payload"],
                str(stream["packets"]),
                _duration(stream["silent_ms"]),
                f"{rtp['jitter_us']:.0f} µs" if rtp else "",
                _duration(stream["gap_max_ms"]),
                si(mpeg_ts["bits_per_second"]) if mpeg_ts else "",
                _trouble(stream),
            )
    _console().print(table if table.row_count else "no streams")


def workers(result: list[dict[str, Any]]) -> None:
    """A line for each worker."""
    table = _table(
        *("core", "pid", "state", "in", "matched", "relayed", "packets/s", "bit/s", "rings", "dropped by cause")
    )
    for worker in result:
        table.add_row(
            str(worker["core"]),
            str(worker["pid"]),
            worker["state"],
            str(worker["packets_in"]),
            str(worker["packets_matched"]),
            str(worker["packets_relayed"]),
            si(worker["packets_per_second"]),
            si(worker["bits_per_second"]),
            _rings(worker),
            _drops(worker["drops"]),
        )
    _console().print(table)
