"""Both clients, and the examples of docs/api.md, with a live relay in a namespace."""

import asyncio
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay import AsyncClient, Client, ControlError, Output, Rule, Stats
from tests.system.harness import Relay
from tests.test_docs import examples
from tools.netns import Host

FIRST, SECOND = examples("api.md")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    with Host("api") as host:
        host.ip("link", "add", "eth1", "type", "veth", "peer", "name", "far")
        host.ip("addr", "add", "10.0.0.1/24", "dev", "eth1")
        for end in ("eth1", "far"):
            host.ip("link", "set", end, "up")
        relay = Relay(host, tmp_path_factory.mktemp("api"), ("lo",))
        yield relay
        relay.kill()


def rule(rule_id: str, port: int = 6001) -> Rule:
    return Rule(
        rule_id=rule_id, input_group="239.1.1.1", input_port=5001, outputs=(Output("239.2.2.2", port, "eth1", 16, 34),)
    )


def test_every_command_of_the_client(live: Relay) -> None:
    with Client(live.socket, 30) as client:
        assert re.fullmatch(r"\d+\.\d+\.\d+", client.ping().version)
        assert client.add_rule(rule("a")).rule_ids == ("a",)
        assert client.add_rules([rule("a"), rule("b", 6002)]).unchanged == ("a",)
        with pytest.raises(ControlError, match=r"rule a .*--replace"):
            client.add_rule(rule("a", 6003))
        assert client.add_rule(rule("a", 6003), replace=True).unchanged == ()
        active = {item.rule_id: item for item in client.rules()}
        assert (active["a"].outputs, active["a"].state) == (rule("a", 6003).outputs, "active")
        stats = client.stats()
        assert isinstance(stats, Stats)
        assert [item.outputs[0].output for item in stats.rules] == ["239.2.2.2:6002:eth1", "239.2.2.2:6003:eth1"]
        (worker,) = client.workers()
        assert (worker.state, worker.core, worker.restarts) == ("running", live.cores(1)[0], 0)
        ring = f"mcr_{live.instance}_dp_c{worker.core}_ingress"
        assert client.set_log_level("debug", facility="Ingress") == {ring: "debug"}
        assert client.log_levels()[ring] == "debug"
        assert client.remove_rules(["a", "b"]).rule_ids == ("a", "b")
        assert client.rules() == []


def test_the_client_for_asyncio_says_the_same(live: Relay) -> None:
    async def run() -> None:
        async with AsyncClient(live.socket, 30) as client:
            await client.add_rule(rule("a"))
            with Client(live.socket, 30) as other:
                assert await client.rules() == other.rules()
                assert (await client.stats()).rules == other.stats().rules
            versions = await asyncio.gather(*(client.ping() for _ in range(20)))
            assert len(set(versions)) == 1
            assert (await client.remove_rule("a")).rule_ids == ("a",)
            with pytest.raises(ControlError, match="no rule a"):
                await client.remove_rule("a")

    asyncio.run(run())


@pytest.mark.parametrize(
    ("program", "prints"),
    [
        (FIRST, "added: tv\ntv 239.1.1.1 active\n0 relayed, 0 lost\n"),
        (SECOND, "1 worker, 100 rules\nno rule chanel-1: `mcrctl list-rules` shows those there are\n"),
    ],
    ids=["Client", "AsyncClient"],
)
def test_an_example_prints_what_it_says(live: Relay, tmp_path: Path, program: str, prints: str) -> None:
    """As it stands, but for the control socket's path."""
    file = tmp_path / "example.py"
    file.write_text(re.sub(r"Client\(", f'Client("{live.socket}", ', program))
    result = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, prints), result.stderr


def test_a_restart_returns_when_every_worker_is_another(live: Relay) -> None:
    """Of the client for asyncio; mcrctl uses the other one's, see test_handover.py."""

    async def run() -> None:
        async with AsyncClient(live.socket, 30) as client:
            (former,) = await client.workers()
            assert await client.restart() == 1
            (worker,) = await client.workers()
            assert (worker.state, worker.pid != former.pid) == ("running", True)

    asyncio.run(run())
    live.wait_for_log("Took over from supervisor")
