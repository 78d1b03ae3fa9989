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
from services.console.data import overview
from services.console.pages import objectives_page
from tests.unit.runtime.telemetry.test_metrics import documented

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


# What the collector's components take, by the `mapstructure` names of their Config structs in opentelemetry-collector
# and -contrib; {}: any of its own.
QUEUE = {"enabled": {}, "num_consumers": {}, "queue_size": {}, "sizer": {}, "block_on_overflow": {}}
RETRY = {"enabled": {}, "initial_interval": {}, "max_interval": {}, "max_elapsed_time": {}, "multiplier": {}}
POLICIES = {
    "always_sample": {},
    "latency": {"threshold_ms": {}, "upper_threshold_ms": {}},
    "numeric_attribute": {"key": {}, "min_value": {}, "max_value": {}, "invert_match": {}},
    "probabilistic": {"sampling_percentage": {}, "hash_salt": {}},
    "status_code": {"status_codes": {}},
    "string_attribute": {"key": {}, "values": {}, "enabled_regex_matching": {}, "invert_match": {}},
    "rate_limiting": {"spans_per_second": {}},
}
COMPONENTS = {
    "receivers": {"otlp": {"protocols": {"grpc": {"endpoint": {}, "max_recv_msg_size_mib": {}, "tls": {}}}}},
    "processors": {
        "memory_limiter": {"check_interval": {}, "limit_mib": {}, "spike_limit_mib": {}},
        "tail_sampling": {
            "decision_wait": {}, "num_traces": {}, "expected_new_traces_per_sec": {}, "policies": {},
        },
        "batch": {"send_batch_size": {}, "send_batch_max_size": {}, "timeout": {}},
    },
    "exporters": {
        "otlp": {"endpoint": {}, "tls": {"insecure": {}}, "sending_queue": QUEUE, "retry_on_failure": RETRY}
    },
    "extensions": {"health_check": {"endpoint": {}, "path": {}}},
}  # fmt: skip


def unknown(config, schema, where=""):
    """What `config` has and `schema` does not."""
    for key, value in config.items():
        if key not in schema:
            yield f"{where}{key}"
        elif schema[key] and isinstance(value, dict):
            yield from unknown(value, schema[key], f"{where}{key}.")


@pytest.fixture(scope="module")
def collector():
    return yaml.safe_load((DEPLOY / "otel-collector/config.yaml").read_text())


def test_the_collector_uses_what_it_declares_and_declares_what_it_uses(collector):
    used = {"extensions": set(collector["service"]["extensions"])}
    for pipeline in collector["service"]["pipelines"].values():
        for kind in ("receivers", "processors", "exporters"):
            used.setdefault(kind, set()).update(pipeline[kind])
    assert {kind: set(collector[kind]) for kind in used} == used
    assert set(collector) == {*used, "service"}


def test_the_collectors_components_take_their_settings(collector):
    for kind, known in COMPONENTS.items():
        # A name may follow the type: otlp/traces.
        declared = {name.partition("/")[0]: settings for name, settings in collector[kind].items()}
        assert list(unknown(declared, known)) == []


def test_the_collector_limits_memory_first_and_batches_last(collector):
    assert collector["service"]["pipelines"]["traces"]["processors"] == ["memory_limiter", "tail_sampling", "batch"]


def test_tail_sampling_keeps_what_failed_was_slow_or_was_retried_by_names_that_spans_have(collector):
    policies = collector["processors"]["tail_sampling"]["policies"]
    attributes = (ROOT / "docs/architecture.md").read_text()
    for policy in policies:
        kind = policy["type"]
        assert set(policy) == {"name", "type", kind}
        assert list(unknown(policy[kind], POLICIES[kind])) == []
        if "key" in policy[kind]:
            assert policy[kind]["key"].removeprefix("ringmesh.") in re.findall(
                r"`(?:ringmesh)?\.([a-z_.]+)`", attributes
            )
    assert {policy["name"] for policy in policies} == {"failed", "kept", "slow", "retried", "rest"}
