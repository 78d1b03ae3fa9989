import gc
import os
import subprocess
import sys
import tempfile
from importlib import import_module

import pytest


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
    thresholds, umask = gc.get_threshold(), os.umask(0o022)

    def run(module, **environment):
        for name in [name for name in os.environ if name.startswith("RINGMESH_")]:
            monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(f"RINGMESH_{name}", value)
        with pytest.raises(SystemExit) as ended:
            import_module(f"{module}.main").main()
        return ended.value.code, capsys.readouterr().err

    yield run
    gc.set_threshold(*thresholds)
    os.umask(umask)


@pytest.mark.parametrize(
    ("module", "environment", "words"),
    [
        ("router", {"ENGINE": "steam"}, ["RINGMESH_ENGINE", "'native' or 'grpcio'", "'steam'"]),
        ("router", {"WORKERS": "nowhere"}, ["RINGMESH_WORKERS", "host:port", "nowhere"]),
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
        ("router", {"CONFIG": "/nowhere.toml"}, ["RINGMESH_CONFIG", "/nowhere.toml"]),
        ("services.inference", {"MODELS": "http://x/models"}, ["RINGMESH_MODELS", "https"]),
    ],
)
def test_a_wrong_setting_is_told_in_one_line_and_exits_with_2(run_here, module, environment, words):
    code, printed = run_here(module, **environment)
    assert code == 2, printed
    in_one_line(printed, words)


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
