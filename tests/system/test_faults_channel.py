"""The supervisor's messages to a worker that does not read: none is lost, whatever becomes of the worker.

gen ──left── relay ──right── sink        10.1.0.0/24, 10.2.0.0/24
"""

import contextlib
import os
import signal
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

from relay import api
from relay.client import Client
from relay.rules import Output, Rule
from tests.system.conftest import StartRelay
from tests.system.harness import Relay, assert_perfect, receiving, send, wait_until
from tools.netns import Host, Line

RULES = 300
CHANGES_A_RULE = 2
IN, OUT = "239.1.1.1:5001", "239.2.2.2:6001:right"
STOPPED_S = 0.4  # a little less than what is taken for a hang, and now and then more on a busy machine
RUNS_S = 0.1
OUTPUTS = 16_000
OUTPUTS_A_RULE = 1000


@contextlib.contextmanager
def stopped_again_and_again(relay: Relay) -> Iterator[None]:
    """Whatever worker there is, is stopped by SIGSTOP most of the time while the block runs."""
    over = threading.Event()

    def run() -> None:
        with Client(relay.socket) as client:
            while not over.wait(RUNS_S):
                workers = client.ask(api.ListWorkers()).result
                for number in (signal.SIGSTOP, signal.SIGCONT):
                    for worker in workers:
                        with contextlib.suppress(ProcessLookupError):
                            if worker["pid"]:
                                os.kill(worker["pid"], number)
                    if number == signal.SIGSTOP:
                        over.wait(STOPPED_S)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def rule(number: int, port: int) -> Rule:
    group = f"239.1.{2 + number // 200}.{number % 200}"
    output = Output("239.2.2.3", port, "right")
    return Rule(rule_id=f"r{number}", input_group=group, input_port=5001, outputs=(output,))


def send_one_to_each(host: Host, rules: list[Rule]) -> None:
    with host.inside(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        index = socket.if_nametoindex("right")
        mreqn = struct.pack("@4s4si", bytes(4), bytes(4), index)
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, mreqn)
        for each in rules:
            sender.sendto(b"one", (each.input_group, each.input_port))


def relayed_by_rule(relay: Relay) -> dict[str, tuple[int, list[int]]]:
    return {
        each["rule_id"]: (each["packets_matched"], [output["packets"] for output in each["outputs"]])
        for each in relay.stats()["rules"]
    }


def test_a_worker_that_is_stopped_while_rules_change_has_all_of_them_in_the_end(
    line: Line, start_relay: StartRelay
) -> None:
    """It is either the same worker, which reads what waits, or another one, which is handed everything anew."""
    relay = start_relay(line.hosts[1], ("left",), 1, "--ring-mib", "64")
    with stopped_again_and_again(relay), Client(relay.socket) as client:
        batch = 50
        for turn in range(CHANGES_A_RULE):
            for at in range(0, RULES, batch):
                some = tuple(rule(number, 7000 + number + 1000 * turn) for number in range(at, at + batch))
                client.ask(api.AddRules(some, replace=True))
                client.ask(api.RemoveRules((some[0].rule_id,)))
                client.ask(api.AddRules(some[:1]))
    wait_until(lambda: relay.ask("list-workers")[0]["state"] == "running", "a worker runs")
    relay.add("last", "239.1.9.9:5009", "239.2.2.9:6009:right")  # confirmed by the worker: it has read everything
    rules = [rule(number, 7000 + number + 1000 * (CHANGES_A_RULE - 1)) for number in range(RULES)]
    send_one_to_each(line.hosts[0], rules)
    expected = {each.rule_id: (1, [1]) for each in rules} | {"last": (0, [0])}
    wait_until(lambda: relayed_by_rule(relay) == expected, "each rule relays its datagram")
    relay.stop()


def test_a_worker_is_handed_sixteen_thousand_sockets_whole(line: Line, start_relay: StartRelay, tmp_path: Path) -> None:
    """Twice as many messages as the channel has room for; the last socket is used, by a worker and by its successor."""
    relay = start_relay(line.hosts[1], ("left",), 1, "--ring-mib", "64")
    with Client(relay.socket, 120) as client:
        for at in range(0, OUTPUTS, OUTPUTS_A_RULE):
            outputs = tuple(Output("239.3.0.1", 1 + at + port, "right") for port in range(OUTPUTS_A_RULE))
            group = f"239.1.2.{at // OUTPUTS_A_RULE}"
            many = Rule(rule_id=f"many{at}", input_group=group, input_port=5001, outputs=outputs)
            client.ask(api.AddRules((many,)))
    relay.add("r", IN, OUT)
    (worker,) = relay.ask("list-workers")
    os.kill(worker["pid"], signal.SIGKILL)
    wait_until(lambda: relay.ask("list-workers")[0]["pid"] not in (0, worker["pid"]), "the next worker")
    with receiving(line.hosts[2], tmp_path, "--interface", "left") as summary:
        send(line.hosts[0], "--interface", "right", "--rate", "20000", "--count", "20000")
        assert_perfect(summary(20_000), 20_000)
    send_one_to_each(line.hosts[0], [rule for rule in _rules(relay) if rule.rule_id.startswith("many")])
    expected = [(1, [1] * OUTPUTS_A_RULE)] * (OUTPUTS // OUTPUTS_A_RULE)
    wait_until(
        lambda: [found for name, found in relayed_by_rule(relay).items() if name.startswith("many")] == expected,
        "every socket sends",
    )
    relay.stop()


def _rules(relay: Relay) -> list[Rule]:
    return [
        Rule(rule_id=found["rule_id"], input_group=found["input_group"], input_port=found["input_port"], outputs=())
        for found in relay.ask("list-rules")
    ]
