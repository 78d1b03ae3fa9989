"""What deploy/ configures is there: metrics in the table, runbooks in the operations page, alerts for what they say."""

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from router.settings import RouterSettings
from services.console import objectives_page, overview
from tests.unit.test_metrics import documented

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
RULES = DEPLOY / "prometheus/rules.yml"
RECORD = re.compile(r"\bringmesh:[a-z_]+:[a-z0-9_]+\b")

promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool, from Debian's package prometheus")


def rules():
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def alerts():
    return [rule for rule in rules() if "alert" in rule]


def dashboards():
    spec = importlib.util.spec_from_file_location("build", DEPLOY / "grafana/build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    return build


def queries():
    """(where, PromQL) of every rule and every panel."""
    for rule in rules():
        yield rule.get("alert") or rule["record"], rule["expr"]
    for path in DEPLOY.glob("grafana/dashboards/*.json"):
        dashboard = json.loads(path.read_text())
        for panel in dashboard["panels"]:
            for target in panel.get("targets", ()):
                yield f"{path.stem}: {panel['title']}", target["expr"]
        for variable in dashboard["templating"]["list"]:
            yield f"{path.stem}: {variable['name']}", variable["query"]


@pytest.mark.parametrize(("where", "query"), list(queries()))
def test_every_metric_and_label_in_use_is_in_the_table(where, query):
    table = {family.name: family for family in documented()}
    records = {rule["record"] for rule in rules() if "record" in rule}
    assert set(RECORD.findall(query)) <= records
    for name, labels in re.findall(r"\b(ringmesh_[a-z_]+)\b(?:\{([^}]*)\})?", query):
        family = table.get(name) or table[re.sub(r"_(bucket|sum|count)$", "", name)]
        if family.name != name:
            assert family.kind == "histogram"
        used = set(re.findall(r"([a-z_]+)\s*[=!]~?", labels))
        assert used <= {*family.labels, "instance", "le"}


def test_every_alert_has_its_section_in_the_operations_page():
    page = (ROOT / "docs/operations.md").read_text()
    headings = set(re.findall(r"^### (\w+)$", page, re.MULTILINE))
    assert {alert["alert"] for alert in alerts()} == {name for name in headings if name.startswith("Ringmesh")}
    for alert in alerts():
        assert alert["annotations"]["runbook_url"] == f"docs/operations.md#{alert['alert'].lower()}"
        assert alert["labels"]["severity"] in ("page", "ticket")
        assert alert["annotations"]["summary"]


def test_every_alert_has_a_test_of_its_own():
    tested = set()
    for path in DEPLOY.glob("prometheus/*_test.yml"):
        for test in yaml.safe_load(path.read_text())["tests"]:
            tested |= {case["alertname"] for case in test["alert_rule_test"] if case["exp_alerts"]}
    assert tested == {alert["alert"] for alert in alerts()}


def test_router_console_and_alerts_watch_the_same_objectives():
    """The console learns them from the routers' metrics; the rules have the defaults of the settings."""
    names = ("slo_availability", "slo_latency", "slo_latency_seconds")
    availability, latency, seconds = (RouterSettings.model_fields[name].default for name in names)
    faults = "|".join(sorted(overview.SERVER_FAULTS))
    text = RULES.read_text()
    for match in re.findall(r'code=~"([A-Z_|]*UNAVAILABLE[A-Z_|]*)"', text):
        assert "|".join(sorted(match.split("|"))) == faults
    assert f'le="{seconds:g}"' in text
    fast = next(alert["expr"] for alert in alerts() if alert["alert"] == "RingmeshUnavailable")
    assert f"{objectives_page.FAST_BURN} * {1 - availability:.3f}" in fast
    slow = next(alert["expr"] for alert in alerts() if alert["alert"] == "RingmeshSlow")
    assert f"{objectives_page.FAST_BURN} * {1 - latency:.2f}" in slow


@promtool
@pytest.mark.parametrize("name", ["rules_test.yml", "rules_long_test.yml"])
def test_alerts_fire_for_what_they_say_and_for_nothing_else(name):
    done = subprocess.run(
        ["promtool", "test", "rules", DEPLOY / "prometheus" / name], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


@promtool
def test_prometheus_takes_its_configuration():
    done = subprocess.run(
        ["promtool", "check", "config", DEPLOY / "prometheus/prometheus.yml"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_dashboards_are_what_their_source_says():
    build = dashboards()
    assert {path.stem for path in build.FOLDER.glob("*.json")} == set(build.DASHBOARDS)
    for name in build.DASHBOARDS:
        assert (build.FOLDER / f"{name}.json").read_text() == build.build(name), "run python deploy/grafana/build.py"


def test_the_collector_uses_what_it_declares():
    config = yaml.safe_load((DEPLOY / "otel-collector/config.yaml").read_text())
    for pipeline in config["service"]["pipelines"].values():
        for kind in ("receivers", "processors", "exporters"):
            assert set(pipeline[kind]) <= set(config[kind])
    assert set(config["service"]["extensions"]) <= set(config["extensions"])
    policies = {policy["name"] for policy in config["processors"]["tail_sampling"]["policies"]}
    assert {"failed", "slow", "rest"} <= policies
