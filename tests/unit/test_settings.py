import os
import subprocess
import sys
import tempfile
from importlib import import_module
from typing import get_args

import pytest
from pydantic import ValidationError

from services.runtime.process.settings import describe


def run(module, **environment):
    """(exit code, what it printed)"""
    done = subprocess.run(
        [sys.executable, "-m", module], env={f"RINGMESH_{k}": v for k, v in environment.items()},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return done.returncode, done.stderr


def in_one_line(printed, words):
    assert all(word in printed.strip().splitlines()[-1] for word in words), printed
    assert "Traceback" not in printed


@pytest.fixture
def run_here(monkeypatch, capsys):
    """As `run`, in this process, which has imported the module: for settings that are refused when they are read."""
    umask = os.umask(0o022)

    def run(module, **environment):
        for name in [name for name in os.environ if name.startswith("RINGMESH_")]:
            monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(f"RINGMESH_{name}", value)
        with pytest.raises(SystemExit) as ended:
            import_module(f"{module}.main").main()
        return ended.value.code, capsys.readouterr().err

    yield run
    os.umask(umask)


@pytest.mark.parametrize(
    ("module", "environment", "words"),
    [
        ("router", {"ENGINE": "steam"}, ["RINGMESH_ENGINE", "'native' or 'grpcio'", "'steam'"]),
        ("router", {"WORKERS": "nowhere"}, ["RINGMESH_WORKERS", "host:port", "nowhere"]),
        ("router", {"WORKERS": "a:65536"}, ["RINGMESH_WORKERS", "host:port", "a:65536"]),
        ("router", {"WORKERS": "a:1,a:1"}, ["RINGMESH_WORKERS", "twice"]),
        ("router", {"WORKERS": "dns://workers"}, ["RINGMESH_WORKERS", "dns://name:port", "dns://workers"]),
        ("router", {"DISCOVERY_URL": "http://x"}, ["RINGMESH_DISCOVERY_URL", "http://x"]),
        (
            "services.inference",
            {"ADDRESS": "0.0.0.0:1", "DISCOVERY_URL": "redis://x"},
            ["RINGMESH_ADVERTISE", "0.0.0.0:1", "host:port"],
        ),
        ("services.inference", {"ADVERTISE": "here"}, ["RINGMESH_ADVERTISE", "host:port", "here"]),
        ("router", {"REDIS_URL": "http://x", "KEY_SECRET": "s"}, ["RINGMESH_REDIS_URL", "http://x"]),
        ("router", {"REDIS_URL": "redis://x"}, ["RINGMESH_KEY_SECRET is not set"]),
        (
            "router",
            {"SERVICE_CERTIFICATE": "/nowhere.pem", "SERVICE_KEY": "/nowhere.key", "SERVICE_CA": "/nowhere.ca"},
            ["cannot read /nowhere.pem"],
        ),
        ("router", {"CONFIG": "/nowhere.toml"}, ["RINGMESH_CONFIG", "/nowhere.toml"]),
        ("services.inference", {"MODELS": "http://x/models"}, ["RINGMESH_MODELS: a model repository is", "https"]),
        ("cache", {"OTLP_ENDPOINT": "collector"}, ["RINGMESH_OTLP_ENDPOINT", "http://host:4317"]),
        ("router", {"ADDRESS": "127.0.0.1"}, ["RINGMESH_ADDRESS: must be host:port or unix:/path", "'127.0.0.1'"]),
        ("router", {"METRICS_ADDRESS": "unix:/m"}, ["RINGMESH_METRICS_ADDRESS: must be host:port, got 'unix:/m'"]),
        ("cache", {"METRICS_ADDRESS": "127.0.0.1:99999"}, ["RINGMESH_METRICS_ADDRESS: must be host:port"]),
        ("router", {"LEDGER_ADDRESS": "ledger"}, ["RINGMESH_LEDGER_ADDRESS: must be host:port", "'ledger'"]),
        ("router", {"CACHE_QUOTAS": "acme=2"}, ["RINGMESH_CACHE_QUOTAS: ", "got '2'"]),
        ("router", {"ADMIN_NETWORKS": "10.0.0.1/8"}, ["RINGMESH_ADMIN_NETWORKS: ", "got '10.0.0.1/8'"]),
    ],
)
def test_a_wrong_setting_is_told_in_one_line_and_exits_with_2(run_here, module, environment, words):
    code, printed = run_here(module, **environment)
    assert code == 2, printed
    in_one_line(printed, words)


def test_settings_that_contradict_each_other_are_told_without_the_others(run_here):
    secrets = {"KEY_SECRET": "hidden", "DATABASE_URL": "postgresql://u:hidden@h/db"}
    code, printed = run_here("services.ledger", MINUTE_DAYS="40", **secrets)
    assert code == 2
    in_one_line(printed, ["ledger: RINGMESH_MINUTE_DAYS is at most RINGMESH_USAGE_DAYS"])
    assert "hidden" not in printed


@pytest.mark.parametrize(
    ("module", "environment", "words"),
    [
        ("router", {"ADDRESS": "1.2.3.4:1"}, ["1.2.3.4:1"]),
        ("services.inference", {"MODELS": "/nowhere"}, ["/nowhere"]),
        (
            "services.inference",
            {"MODELS": "https://127.0.0.1:1/models", "STATE_DIR": tempfile.gettempdir()},
            ["https://127.0.0.1:1/models/SHA256SUMS", "Connection refused"],
        ),
        ("cache", {"LOCAL_TIER_BYTES": "-1"}, ["RINGMESH_LOCAL_TIER_BYTES", "-1"]),
    ],
)
def test_what_cannot_be_had_is_told_in_one_line_and_exits_with_2(module, environment, words):
    code, printed = run(module, **environment)
    assert code == 2, printed
    in_one_line(printed, words)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("local_tier_bytes", "256MiB", 256 << 20),
        ("local_tier_bytes", "1.5 GB", 1_500_000_000),
        ("local_tier_bytes", "4096", 4096),
        ("peer_bytes_per_second", "2Mi", 2 << 20),
        ("shared_ttl_seconds", "5m", 300),
        ("shared_budget_seconds", "250 ms", 0.25),
        ("shared_ttl_seconds", "7d", 7 * 86400),
        ("drain_seconds", "1.5", 1.5),
    ],
)
def test_sizes_and_durations_accept_units(monkeypatch, name, text, value):
    from cache.settings import CacheSettings

    monkeypatch.setenv(f"RINGMESH_{name.upper()}", text)
    assert getattr(CacheSettings(), name) == value


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({"DRAIN_SECONDS": "5 parsecs"}, "ms, s, m, h or d"), ({"LOCAL_TIER_BYTES": "5 MegaB"}, "MiB or GiB")],
)
def test_an_unknown_unit_is_refused_with_the_known_ones(run_here, environment, expected):
    code, printed = run_here("cache", **environment)
    assert code == 2
    in_one_line(printed, [f"RINGMESH_{next(iter(environment))}", expected])


def test_the_known_variables_are_those_of_all_services():
    from cache.settings import CacheSettings
    from router.settings import RouterSettings
    from services.console.settings import ConsoleSettings
    from services.inference.settings import WorkerSettings
    from services.ledger.settings import LedgerSettings
    from services.runtime.process.variables import KNOWN

    services = (CacheSettings, ConsoleSettings, LedgerSettings, RouterSettings, WorkerSettings)
    assert {name.upper() for settings in services for name in settings.model_fields} | {"CONFIG", "API_KEY"} == KNOWN


def test_an_unknown_variable_is_reported_with_the_nearest_name():
    from services.runtime.process.variables import unknown

    environment = {
        "RINGMESH_WORKRES": "a:1",
        "RINGMESH_ZONE": "a",
        "RINGMESH_FOO_BAR": "",
        "PATH": "",
        # As Kubernetes sets them for a service called ringmesh-router.
        "RINGMESH_ROUTER_SERVICE_HOST": "10.0.0.1",
        "RINGMESH_ROUTER_PORT_8001_TCP": "tcp://10.0.0.1:8001",
    }
    assert unknown(environment) == [
        "the variable RINGMESH_FOO_BAR is unknown and has no effect",
        "the variable RINGMESH_WORKRES is unknown and has no effect; did you mean RINGMESH_WORKERS?",
    ]


def test_a_service_warns_of_an_unknown_variable():
    code, printed = run("services.inference", MODELS="/nowhere", MODLES="/models")
    assert code == 2
    assert "RINGMESH_MODLES is unknown and has no effect; did you mean RINGMESH_MODELS?" in printed


def test_a_variable_wins_over_the_file_and_the_section_over_common(tmp_path, monkeypatch):
    from router.settings import RouterSettings

    file = tmp_path / "ringmesh.toml"
    file.write_text(
        '[common]\ntrace_ratio = 0.5\nlog_level = "DEBUG"\n[router]\nlog_level = "ERROR"\nworkers = ["a:1"]\n'
    )
    monkeypatch.setenv("RINGMESH_CONFIG", str(file))
    monkeypatch.setenv("RINGMESH_TRACE_RATIO", "0.25")
    settings = RouterSettings()
    assert (settings.trace_ratio, settings.log_level, settings.workers) == (0.25, "ERROR", ("a:1",))


def test_routers_that_share_a_port_confirm_purges_under_names_of_their_own_which_they_keep():
    from router.settings import RouterSettings

    def member(metrics):
        return RouterSettings(address="127.0.0.1:8001", metrics_address=metrics, share_port=True).member

    assert member("127.0.0.1:8002") != member("127.0.0.1:8003")
    assert member("127.0.0.1:8002") == member("127.0.0.1:8002")
    alone = RouterSettings(address="127.0.0.1:8001", metrics_address="127.0.0.1:0")
    assert "127.0.0.1:8001" in alone.member


def test_a_misspelt_name_in_the_file_is_told_without_its_value(run_here, tmp_path):
    file = tmp_path / "ringmesh.toml"
    file.write_text("[router]\nkey_secrets = 'hunter2'\n")
    code, printed = run_here("router", CONFIG=str(file))
    assert code == 2
    assert "KEY_SECRETS" in printed
    assert "hunter2" not in printed


def test_a_url_with_a_password_is_refused_without_showing_it(run_here):
    code, printed = run_here("services.inference", MODELS="http://user:hunter2@host/models")
    assert code == 2
    assert "hunter2" not in printed


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400", "-1", "", "1e308", "some"])
@pytest.mark.parametrize(
    ("module", "settings"),
    [
        ("router", "RouterSettings"),
        ("cache", "CacheSettings"),
        ("services.inference", "WorkerSettings"),
        ("services.ledger", "LedgerSettings"),
        ("services.console", "ConsoleSettings"),
    ],
)
def test_a_number_that_is_none_is_refused_in_words(monkeypatch, module, settings, value):
    read = getattr(import_module(f"{module}.settings"), settings)
    for name in [name for name in os.environ if name.startswith("RINGMESH_")]:
        monkeypatch.delenv(name)
    for name, field in read.model_fields.items():
        if not {int, float} & {field.annotation, *get_args(field.annotation)}:
            continue
        with monkeypatch.context() as set_here:
            set_here.setenv(f"RINGMESH_{name.upper()}", value)
            said = ""
            try:
                read()
            except ValidationError as error:
                said = describe(error)
            assert f"RINGMESH_{name.upper()}: " in said or value == "1e308"
