"""The way out of a datagram that a rule takes: its outputs, and what has been counted. Pure."""

from collections.abc import Iterator

from relay.cli.explaining.facts import Facts, Step
from relay.protection import LEG_NAMES
from relay.rules import Rule, is_multicast, legs, limits_of, output_name
from relay.supervisor.egress import TTL_MULTICAST_DEFAULT
from relay.supervisor.plan import PlannedOutput, PlannedRule


def followed(facts: Facts, planned: PlannedRule, ttl: int | None, leg: int = 0) -> Iterator[Step]:
    """A rule that takes the datagram by its first or second leg, its outputs, and what it has counted."""
    rule, taken = planned.rule, legs(planned.rule)[leg]
    source = f" from {taken.source}" if taken.source else ""
    yield Step("rule", "pass", f"rule {rule.rule_id} takes {taken.group}:{taken.port}{source}")
    if rule.protection is not None:
        yield _protection(facts, rule, leg)
    if limits_of(rule):
        yield Step("limit", "pass", f"rule {rule.rule_id} lets {limits_of(rule)} pass, more is dropped as rate_limit")
    for output in planned.outputs:
        yield _output(facts, rule, output, ttl)
    yield _counters(facts, rule)


def _protection(facts: Facts, rule: Rule, leg: int) -> Step:
    """What becomes of it beside what comes by the other leg."""
    other = f"{LEG_NAMES[1 - leg]} leg, {legs(rule)[1 - leg]}"
    told = (facts.rule_stats.get(rule.rule_id) or {}).get("protection")
    if rule.protection == "seamless":
        reason = f"it comes by the {LEG_NAMES[leg]} leg: the first copy of each RTP sequence number leaves, so it is "
        return Step("protection", "note", f"{reason}withheld if it has come by the {other}, before")
    active = told["active"] if told else LEG_NAMES[0]
    reason = f"it comes by the {LEG_NAMES[leg]} leg, and the {active} one is relayed now"
    if active == LEG_NAMES[leg]:
        return Step("protection", "pass", reason)
    return Step("protection", "note", f"{reason}: it is withheld as long as datagrams come by the {other}")


def _counters(facts: Facts, rule: Rule) -> Step:
    stats = facts.rule_stats.get(rule.rule_id)
    if stats is None:
        return Step("counters", "note", f"rule {rule.rule_id} has none yet")
    causes: dict[str, int] = dict(stats.get("drops", {}))
    for output in stats["outputs"]:
        for cause, count in output["drops"].items():
            causes[cause] = causes.get(cause, 0) + count
    dropped = ", ".join(f"{cause} {count}" for cause, count in causes.items() if count)
    reason = f"rule {rule.rule_id} has matched {stats['packets_matched']}, relayed {stats['packets_relayed']}, "
    reason += f"dropped {sum(causes.values())}" + (f" because {dropped}" if dropped else "")
    if dropped:
        return Step("counters", "note", reason, "`mcrctl doctor` tells what each cause means")
    if not stats["packets_matched"]:
        return Step("counters", "note", f"{reason}: no datagram has reached it yet", "see that the sender sends")
    return Step("counters", "pass", reason)


def _output(facts: Facts, rule: Rule, planned: PlannedOutput, ttl: int | None) -> Step:
    """Whether an output sends it, and how it leaves; `ttl` as it arrives, if that is known."""
    output, key = planned.output, planned.key
    name = output_name(output)
    step = f"output {name}"
    if key is None:
        remedy = f"ip link set {output.interface} up" if "down" in str(planned.fault) else "it leaves once that changes"
        return Step(step, "stop", f"waiting: {planned.fault}", remedy)
    if key.is_connected and facts.sockets and not _is_open(facts, key.address, (key.group, key.port)):
        return Step(step, "stop", "its socket is not open: the kernel refused it", "the log of mcrd says why")
    if output.ttl == "decrement" and ttl == 1:
        remedy = f"send with a higher TTL, or give a fixed one: --output {name}:TTL"
        return Step(step, "stop", "it comes with TTL 1, less 1 is 0: dropped as ttl", remedy)
    source = "the original source" if rule.preserve_source else key.address
    dscp = f", DSCP {output.dscp}" if output.dscp is not None else ""
    reason = (
        f"active: leaves {output.interface} to {output.group}:{output.port} from {source} with {_ttl(facts, planned)}"
    )
    reason += f"{dscp}; payloads over {key.gso_segment_bytes_max} bytes as fragments (MTU {key.mtu_bytes})"
    if output.ttl == "decrement" and ttl is None:
        return Step(step, "note", reason, f"what comes with TTL 1 is dropped: send with more, or --output {name}:TTL")
    if is_multicast(output.group) and output.ttl in (None, 1):
        return Step(step, "pass", reason, f"no router passes TTL 1 on: behind one, --output {name}:TTL")
    return Step(step, "pass", reason)


def _is_open(facts: Facts, address: str, remote: tuple[str, int]) -> bool:
    return any(udp.local[0] == address and udp.remote == remote for udp in facts.sockets)


def _ttl(facts: Facts, planned: PlannedOutput) -> str:
    ttl = planned.output.ttl
    if ttl == "decrement":
        return "the incoming TTL less 1"
    if ttl is None:
        ttl = TTL_MULTICAST_DEFAULT if is_multicast(planned.output.group) else facts.ttl_default
    return f"TTL {ttl}"
