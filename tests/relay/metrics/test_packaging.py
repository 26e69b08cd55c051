"""Alerts and dashboard name only metrics that exist, and the alerts do what they say."""

import http.client
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from relay.metrics import collector
from relay.metrics.families import FAMILIES
from tests.syscall_filter import allowed_calls
from tests.system.harness import wait_until
from tools.environment import CHECKOUT

PROMETHEUS = CHECKOUT / "packaging" / "prometheus"
UNITS = CHECKOUT / "packaging" / "systemd"
DASHBOARD = CHECKOUT / "packaging" / "grafana" / "mcr.json"
NAMES = {name for family in FAMILIES for name in family.exposed()}
NAMES |= {collector.UP[0], collector.BUILD[0] + "_info", collector.OMITTED[0]}
PAGE = CHECKOUT / "docs" / "metrics.md"


def metrics_of(query: str) -> set[str]:
    return set(re.findall(r"\bmcr_\w+", query))


def queries(node: Any) -> list[str]:
    """What a dashboard asks Prometheus, wherever it stands."""
    if isinstance(node, dict):
        own = [node[key] for key in ("expr", "definition") if key in node]
        return own + [query for value in node.values() for query in queries(value)]
    return [query for value in node for query in queries(value)] if isinstance(node, list) else []


def promtool(*arguments: str) -> None:
    result = subprocess.run(["promtool", *arguments], cwd=PROMETHEUS, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_alerts_pass_their_unit_tests() -> None:
    promtool("check", "rules", "alerts.yml")
    promtool("test", "rules", "alerts.test.yml")


def test_alerts_ask_for_metrics_that_exist_and_each_is_tested() -> None:
    text = (PROMETHEUS / "alerts.yml").read_text()
    assert metrics_of(text) <= NAMES
    fired = re.findall(r"alertname: (\w+)\n +exp_alerts", (PROMETHEUS / "alerts.test.yml").read_text())
    assert set(re.findall(r"- alert: (\w+)", text)) == set(fired)


def test_the_dashboard_asks_for_metrics_that_exist_by_queries_that_parse(tmp_path: Path) -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    asked = queries(dashboard)
    assert len(asked) > 20
    assert set().union(*map(metrics_of, asked)) <= NAMES
    expressions = [query for query in asked if not query.startswith("label_values")]
    rules = "groups:\n- name: dashboard\n  rules:\n"
    for number, expression in enumerate(expressions):
        filled = expression.replace("$__rate_interval", "1m").replace("$__range", "1h")
        rules += f"  - record: query{number}\n    expr: {json.dumps(filled, ensure_ascii=False)}\n"
    file = tmp_path / "queries.yml"
    file.write_text(rules)
    promtool("check", "rules", str(file))
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))


def test_the_documentation_has_every_metric_and_no_other() -> None:
    rows = [line.split("|")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `mcr_")]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == NAMES


@pytest.mark.parametrize("unit", ["mcr-metrics.service", "mcr-metrics@.service"])
def test_the_unit_is_valid_and_exposes_little(tmp_path: Path, unit: str) -> None:
    source = (UNITS / unit).read_text()
    copy = tmp_path / unit.replace("@", "@test")
    copy.write_text(source.replace("ExecStart=/usr/bin/mcrctl", f"ExecStart={Path(sys.executable).parent}/mcrctl"))
    verified = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True, check=False)
    assert (verified.returncode, [line for line in verified.stderr.splitlines() if unit[:3] in line]) == (0, [])
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=10", "--no-pager", str(copy)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-300:]


def directives(unit: str, name: str) -> list[str]:
    text = (UNITS / unit).read_text()
    return re.findall(rf"^{name}=(.*)$", text, re.MULTILINE)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Every system call of `mcrctl metrics` from its start over a scrape to SIGTERM."""
    folder = tmp_path_factory.mktemp("traced")
    trace, log = folder / "trace", folder / "log"
    command = ["strace", "-f", "-qq", "-o", str(trace), str(Path(sys.executable).parent / "mcrctl")]
    command += ["--socket", str(folder / "none.sock"), "metrics", "--listen", "127.0.0.1:0"]
    with log.open("w") as out:
        process = subprocess.Popen(command, stderr=out)
    try:
        target = wait_until(lambda: re.search(r"http://([\d.:]+)/", log.read_text()), "it serves")[1]
        connection = http.client.HTTPConnection(target, timeout=30)
        connection.request("GET", "/metrics")
        assert connection.getresponse().read().endswith(b"mcr_up 0.0\n")
        connection.close()
    finally:
        for child in psutil.Process(process.pid).children():  # strace itself takes no signal
            child.terminate()
        assert process.wait(30) == 0
    return trace.read_text()


@pytest.mark.parametrize("unit", ["mcr-metrics.service", "mcr-metrics@.service"])
def test_the_unit_allows_what_the_process_does(traced: str, unit: str) -> None:
    """As no test has systemd to run it: its calls, address families, and memory that is written and executed."""
    called = set(re.findall(r"^\d+ +(\w+)\(", traced, re.MULTILINE))
    assert {"socket", "accept4", "connect", "execve"} <= called
    assert called - allowed_calls(UNITS / unit) - {"arch_prctl"} == set()  # @default of later systemd versions
    families = set(re.findall(r"socket\((AF_\w+)", traced))
    listens = {"AF_INET"} if unit == "mcr-metrics@.service" else set()  # that one listens on a unix socket
    assert families - listens <= set(directives(unit, "RestrictAddressFamilies")[0].split())
    assert directives(unit, "MemoryDenyWriteExecute") == ["yes"]
    assert re.findall(r"(?:PROT_WRITE\|PROT_EXEC|mprotect\(.*PROT_EXEC)", traced) == []
