"""Checks of the running relay: rules, workers, drops, log."""

from collections.abc import Iterator

from relay.cli.checks.causes import ERRNO_PREFIX, meaning_of
from relay.cli.checks.network import SHOWN_MAX, shown
from relay.cli.checks.registry import Found, check
from relay.cli.checks.situation import Situation
from relay.protection import LEG_NAMES
from relay.wording import counted

RING_FILL_PERCENT_MAX = 80
YOUNGER_S = 5.0  # than the relay: a worker that has been replaced
STOPPED = {"T": "is stopped by a signal", "t": "is held by a debugger", "D": "waits in the kernel", "Z": "has ended"}


@check(why="without a running relay only the host can be checked")
def relay(situation: Situation) -> Iterator[Found]:
    """Whether a relay answers."""
    if situation.relay is None:
        told = f"{situation.silence}: host checks only"
        if "no answer within" in situation.silence:
            yield Found("problem", told, "mcrctl ping", "start mcrd again with its options: it takes workers over")
        else:
            yield Found("note", told, "mcrctl ping", "sudo mcrd --interface INTERFACE")
        return
    number, name = len(situation.relay.rules), f"mcrd {situation.relay.version}"
    yield Found("ok", f"{name} answers, with {counted(number, 'rule')}", "mcrctl ping")
    if not situation.relay.has_private_view:
        text = "its process and its log rings may not be looked at: some checks are left out"
        yield Found("note", text, "/proc/PID/maps", "sudo mcrctl doctor")


@check(why="a rule that waits does not relay, or not through all of its outputs")
def rules(situation: Situation) -> Iterator[Found]:
    """Rules that wait, and what for."""
    if situation.relay is None:
        return
    waiting: dict[str, list[str]] = {}
    for rule_id, state in situation.relay.states.items():
        if state != "active":
            waiting.setdefault(state, []).append(rule_id)
    for state, rule_ids in list(waiting.items())[:SHOWN_MAX]:
        name = state.partition("interface ")[2].partition(" ")[0] or "INTERFACE"
        remedy = f"ip addr add ADDRESS/PREFIX dev {name}" if "address" in state else f"ip link set {name} up"
        remedy = f"make {name}, or change the rule" if "exist" in state else remedy
        which = "rule" if len(rule_ids) == 1 else "rules"
        yield Found("problem", f"{which} {shown(rule_ids)} {state}", "mcrctl list-rules", remedy)
    if not waiting and situation.relay.states:
        yield Found("ok", f"{counted(len(situation.relay.states), 'rule')} active", "mcrctl list-rules")


@check(why="a rule with one leg silent is relayed, and unprotected: the next fault is a loss")
def protection(situation: Situation) -> Iterator[Found]:
    """Legs of protected rules by which nothing comes, and rules that have gone over to the secondary one."""
    if situation.relay is None:
        return
    read = "mcrctl get-stats"
    told = {rule["rule_id"]: rule["protection"] for rule in situation.relay.stats["rules"] if rule.get("protection")}
    lacking: dict[str, list[str]] = {}
    for rule_id, state in told.items():
        for name, leg in zip(LEG_NAMES, state["legs"], strict=False):
            if not leg["delivers"]:
                lacking.setdefault(f"nothing comes by the {name} leg", []).append(f"{rule_id} ({leg['input']})")
    for text, rules_of in lacking.items():
        remedy = "mcrctl explain SOURCE GROUP:PORT --interface INTERFACE, for the leg that is silent"
        yield Found("warning", f"{text} of {shown(rules_of)}", read, remedy)
    away = [rule_id for rule_id, state in told.items() if state["active"] == LEG_NAMES[1]]
    if away:
        yield Found("warning", f"{shown(away)} went over to the secondary leg", read, "see to the primary's sender")
    if told and not lacking and not away:
        yield Found("ok", f"both legs of {len(told)} protected rules deliver", read)


@check(why="a worker that does not run relays nothing; one that is excluded leaves its share to the others")
def workers(situation: Situation) -> Iterator[Found]:
    """Workers that do not run, hang, are excluded, or have been replaced."""
    if situation.relay is None:
        return
    read = "mcrctl list-workers"
    log = "mcrlog tail --facility Supervisor"
    for worker in situation.relay.stats["workers"]:
        who = f"the worker of core {worker['core']}"
        words = (situation.files.text(f"proc/{worker['pid']}/stat") or "").rpartition(") ")[2].split()
        state = STOPPED.get(words[0]) if words and situation.relay.has_private_view else None
        if worker.get("is_excluded"):
            yield Found("problem", f"{who} kept failing, and others have its traffic", read, log)
        elif worker["state"] != "running":
            yield Found("problem", f"{who} is {worker['state']}", read, log)
        elif state is not None:
            yield Found("problem", f"{who} {state}", f"/proc/{worker['pid']}/stat", log)
        elif worker["uptime_s"] + YOUNGER_S < situation.relay.stats["uptime_s"]:
            yield Found("warning", f"{who} was replaced {worker['uptime_s']:.0f} s ago", read, log)
        else:
            yield Found("ok", f"{who} runs", read)
        if worker["ring_fill_max_percent"] >= RING_FILL_PERCENT_MAX:
            text = f"a ring of {who} was {worker['ring_fill_max_percent']} % full or more"
            yield Found("warning", text, read, "mcrd --ring-mib 64, or cores of their own: docs/performance.md")


@check(why="each drop is a datagram that did not leave")
def drops(situation: Situation) -> Iterator[Found]:
    """What was dropped, by cause."""
    if situation.relay is None:
        return
    now = situation.relay.stats["drops"]
    before = situation.relay_earlier.stats["drops"] if situation.relay_earlier is not None else now
    refused = any(cause.startswith(ERRNO_PREFIX) for cause, dropped in now.items() if dropped)
    for cause, dropped in now.items():
        if not dropped or (cause == "send_error" and refused):  # which its errnos say more of
            continue
        meaning = meaning_of(cause)
        grown = dropped - before.get(cause, 0)
        while_looking = f", {grown} of them in the last {situation.interval_s:.0f} s" if grown > 0 else ""
        text = f"{cause} {dropped}{while_looking}: {meaning.text}"
        severity = meaning.growing if grown > 0 else meaning.severity
        yield Found(severity, text, "mcrctl get-stats", meaning.remedy)
    if not any(now.values()):
        yield Found("ok", "nothing was dropped", "mcrctl get-stats")


@check(why="a log record that was lost may be the one that tells of a fault; datagrams are not delayed by it")
def log(situation: Situation) -> Iterator[Found]:
    """Records that found their ring full."""
    lost = situation.probes.log_dropped
    if lost is None:
        return
    for segment, records in lost.items():
        if records:
            text = f"{records} log records were lost in {segment}"
            remedy = "mcrctl log-level set info, or fewer and faster --log-to"
            yield Found("warning", text, f"mcrlog stat {segment}", remedy)
    if not any(lost.values()):
        yield Found("ok", f"no log record was lost in {counted(len(lost), 'ring')}", "mcrlog stat")
