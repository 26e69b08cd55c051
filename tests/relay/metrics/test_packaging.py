"""Alerts and dashboard name only metrics that exist, and the alerts do what they say."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from relay.metrics import collector
from relay.metrics.families import FAMILIES
from tools.environment import CHECKOUT

PROMETHEUS = CHECKOUT / "packaging" / "prometheus"
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
    source = (CHECKOUT / "packaging" / "systemd" / unit).read_text()
    copy = tmp_path / unit.replace("@", "@test")
    copy.write_text(source.replace("ExecStart=/usr/bin/mcrctl", f"ExecStart={Path(sys.executable).parent}/mcrctl"))
    verified = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True, check=False)
    assert (verified.returncode, [line for line in verified.stderr.splitlines() if unit[:3] in line]) == (0, [])
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=10", "--no-pager", str(copy)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-300:]
