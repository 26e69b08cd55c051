"""What other software uses to live with a relay: both clients and the examples of docs/api.md, shells, terminals,
logrotate. One live relay in a namespace.
"""

import asyncio
import contextlib
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay import AsyncClient, Client, ControlError, Output, Rule, Stats
from tests.system.harness import BIN, Relay, wait_until
from tests.test_docs import examples
from tools.environment import CHECKOUT
from tools.netns import Host

FIRST, SECOND = examples("api.md")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    with Host("api") as host:
        host.ip("link", "add", "eth1", "type", "veth", "peer", "name", "far")
        host.ip("addr", "add", "10.0.0.1/24", "dev", "eth1")
        for end in ("eth1", "far"):
            host.ip("link", "set", end, "up")
        folder = tmp_path_factory.mktemp("live")
        relay = Relay(host, folder, ("lo",), 1, "--log-to", "stdout:", "--log-to", f"file:{folder}/mcr.log")
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
        added = client.add_rule(rule("a", 6003), replace=True)
        assert (added.unchanged, added.replaced) == ((), ("a",))
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


def test_a_shell_completes_the_ids_of_rules(live: Relay) -> None:
    with Client(live.socket, 30) as client:
        client.add_rules([rule("news-1"), rule("news-2", 6002), rule("sport", 6003)])
        words = ["mcrctl", "--socket", str(live.socket), "remove-rule", "news"]
        environment = {"COMP_WORDS": " ".join(words), "COMP_CWORD": "4", "_MCRCTL_COMPLETE": "bash_complete"}
        printed = subprocess.run(
            [BIN / "mcrctl"], env={**os.environ, **environment}, capture_output=True, text=True, check=False
        )
        assert printed.stdout.split() == ["plain,news-1", "plain,news-2"]
        client.remove_rules(["news-1", "news-2", "sport"])


@pytest.mark.parametrize("no_color", ["", "1"])
def test_colours_are_for_terminals_whose_user_wants_them(live: Relay, no_color: str) -> None:
    command = [str(BIN / "mcrctl"), "--socket", str(live.socket), "list-workers"]
    environment = {**os.environ, "TERM": "xterm-256color", "NO_COLOR": no_color}
    piped = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "\x1b" not in piped.stdout
    leader, follower = pty.openpty()
    with os.fdopen(leader, "rb", buffering=0) as terminal:
        process = subprocess.Popen(command, env=environment, stdin=follower, stdout=follower, stderr=follower)
        os.close(follower)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: nobody has the other end open any more
            while received := terminal.read(65536):
                shown += received
        assert process.wait() == 0
    assert b"running" in shown
    assert re.findall(rb"\x1b\[[0-9;]*[34]\dm", shown) == []  # no colour of its own; bold is none


def test_logrotate_moves_a_log_and_the_relay_goes_on_in_another(live: Relay, tmp_path: Path) -> None:
    log = live.log.parent / "mcr.log"
    wait_until(lambda: "Control plane worker started" in log.read_text(), "lines are written")
    recipe = (CHECKOUT / "packaging" / "logrotate" / "mcr").read_text()
    recipe = recipe.replace("/var/log/mcr/*.log", str(log)).replace("su mcr mcr", "su root root")
    recipe = re.sub(r"systemctl kill .*", f"kill -HUP {live.pid}", recipe)
    assert f"kill -HUP {live.pid}" in recipe
    file = tmp_path / "logrotate.conf"
    file.write_text(recipe)
    command = ["logrotate", "--force", "--state", str(tmp_path / "state"), str(file)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    wait_until(lambda: log.exists() and "Configuration read again" in log.read_text(), "another file has new lines")
    assert "Control plane worker started" in log.with_name("mcr.log.1").read_text()
