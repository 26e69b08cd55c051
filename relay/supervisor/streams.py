"""Which rules a stream belongs to. The supervisor's: workers know streams by addresses, rules by numbers."""

from collections import defaultdict

import msgspec

from relay.addresses import endpoint
from relay.health import StreamHealth, streams
from relay.supervisor.fleet import Fleet

Input = tuple[str, str]  # as endpoint() writes it, interface


def inputs_of(fleet: Fleet) -> dict[Input, list[tuple[str, str | None]]]:
    """The rules that take in what comes to an input, each with the source that it asks for."""
    found: dict[Input, list[tuple[str, str | None]]] = defaultdict(list)
    for planned in fleet.plan.rules:
        for leg, interfaces in planned.inputs:
            for interface in interfaces:
                found[endpoint(leg.group, leg.port), interface].append((planned.rule.rule_id, leg.source))
    return found


def streams_by_rule(fleet: Fleet) -> dict[str, list[StreamHealth]]:
    """The streams of all workers, by the ids of the rules that they belong to: none, one, or several."""
    seen = [stream for worker in fleet.workers for stream in streams(worker.stats)]
    found: dict[str, list[StreamHealth]] = defaultdict(list)
    if not seen:
        return found
    rules, interfaces = inputs_of(fleet), fleet.rings.interface_names()
    for stream in seen:
        interface = interfaces.get(stream.ring)
        if interface is None:
            continue
        named = msgspec.structs.replace(stream, interface=interface)
        sender = stream.source.rpartition(":")[0].strip("[]")
        for rule_id, source in rules.get((stream.destination, interface), ()):
            if source in (None, sender):
                found[rule_id].append(named)
    return found
