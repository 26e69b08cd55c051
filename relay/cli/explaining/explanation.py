"""What would happen to a datagram, step by step.

    interface ─▶ own egress ─▶ join ─▶ filter ─▶ worker ─▶ rule ─▶ outputs ─▶ counters

Each step says whether the datagram passes it, and why. The plan (relay/supervisor/plan.py) and the filter
(relay/bpf.py) are the relay's own; that `matching` finds what the compiled matcher finds is a test.
"""

from relay.cli.explaining.facts import Datagram, Explanation, Facts, Step
from relay.cli.explaining.rules import matching, no_rule, taking
from relay.cli.explaining.way_in import interface, join, own_egress, packet_filter, worker
from relay.cli.explaining.way_out import followed

CAUSES = ("interface", "own egress", "rule", "join", "filter", "worker", "output")  # the first that stops says most


def explain(facts: Facts, datagram: Datagram) -> Explanation:
    """Every step, also those behind one that stops: there may be several reasons."""
    found = matching(facts.plan.rules, datagram)
    steps = [interface(facts, datagram), own_egress(facts, datagram)]
    admitted = packet_filter(facts, datagram)
    steps += [join(facts, datagram), admitted, worker(facts)]
    if found:
        for planned in found:
            steps += followed(facts, planned, datagram.ttl, taking(planned, datagram))
    else:
        steps.append(no_rule(facts, datagram, admitted.verdict == "pass"))
    stops = [step for step in steps if step.verdict == "stop"]
    outputs = [step for step in steps if step.step.startswith("output")]
    leaves = [step for step in outputs if step.verdict != "stop"]
    fatal = [step for step in stops if not (step in outputs and leaves)]
    if fatal:
        first = min(fatal, key=_rank)
        summary = f"would not be relayed: {first.reason}"
    else:
        names = ", ".join(planned.rule.rule_id for planned in found)
        summary = f"would be relayed by {names} through {len(leaves)} of {len(outputs)} outputs"
    return Explanation(not fatal, summary, datagram.source, datagram.destination, datagram.interface, steps)


def _rank(step: Step) -> int:
    return next((rank for rank, cause in enumerate(CAUSES) if step.step.startswith(cause)), len(CAUSES))
