"""The wheel, installed in an environment elsewhere with packages from the index, relays on lo. MCR_INSTALL=1: it takes
minutes, as everything is compiled anew. The steps are those of docs/packaging.md and packaging/Containerfile.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system.harness import Relay, assert_perfect, receiving, send
from tests.tools.test_packaging import NOT_SOURCE
from tools.environment import CHECKOUT
from tools.netns import Host

DATAGRAMS = 100_000


class Installed(Relay):
    """A relay of another environment."""

    def launch(self, options: list[str]) -> "subprocess.Popen[str]":  # type: ignore[override]
        command = [str(self.log.parent / "venv/bin/mcrd"), "--socket", str(self.socket), "--instance", self.instance]
        with self.log.open("a") as out:
            return self.host.popen([*command, *options], stdout=out, stderr=subprocess.STDOUT)


@pytest.mark.skipif(not os.environ.get("MCR_INSTALL"), reason="MCR_INSTALL=1: two minutes")
@pytest.mark.timeout(900)
def test_an_installed_wheel_relays(tmp_path: Path) -> None:
    copy, python = tmp_path / "source", tmp_path / "venv" / "bin" / "python"
    shutil.copytree(CHECKOUT, copy, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    lock = (CHECKOUT / "requirements.lock").read_text()
    constraints = tmp_path / "constraints.txt"
    constraints.write_text(re.sub(r"^ .*\n", "", lock, flags=re.MULTILINE).replace("\\", ""))
    for command in (
        [sys.executable, "-m", "venv", str(tmp_path / "venv")],
        [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(constraints), str(copy)],
        [str(python), "-m", "relay.dataplane.precompile"],
    ):
        subprocess.run(command, cwd=tmp_path, check=True)
    with Host("installed") as host:
        relay = Installed(host, tmp_path, ("lo",))
        try:
            relay.add("tour", "239.1.1.1:5001", "239.2.2.2:6001:lo")
            with receiving(host, tmp_path, "--idle-timeout", "2") as summary:
                send(host, "--rate", "20000", "--count", str(DATAGRAMS))
                assert_perfect(summary(DATAGRAMS), DATAGRAMS)
            relay.stop()
        finally:
            relay.kill()
    assert "compil" not in relay.text()
