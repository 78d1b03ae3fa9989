"""`ringmesh top`, `explain`, `models` and `cache` against a running stack, and what they say where none runs."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from services.cli.main import app
from tests.system.conftest import eventually
from tests.system.processes import free_address


def ringmesh(*arguments, text=None):
    """In this process, which has imported what the command imports; test_docs and test_up run it as people do."""
    return CliRunner().invoke(app, arguments, input=text)


def shown(*arguments, text=None):
    done = ringmesh(*arguments, text=text)
    assert done.exit_code == 0, done.stderr
    return done.stdout


def refused(*arguments, text=None):
    """The one line that it ends with."""
    done = ringmesh(*arguments, text=text)
    assert done.exit_code == 2, done.stdout + done.stderr
    assert done.stderr.startswith("ringmesh: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_top_prints_one_frame_of_what_the_console_knows(stack):
    # The busiest come first, then by name.
    eventually(lambda: "add_sub 1" in shown("top", "--once", "--state", stack.state))
    frame = shown("top", "--once", "--state", stack.state)
    for words in ("worker-0", "worker-1", "2 of 2 workers serve", "ready", "router", "from cache"):
        assert words in frame


def test_explain_names_the_owner_and_the_others_and_why(stack):
    told = shown("explain", "mlp", "--state", stack.state)
    assert "key " in told
    rows = [line for line in told.splitlines() if "worker-" in line and not line.startswith("owner")]
    assert len(rows) == 2
    assert rows[0].startswith("→")
    owner = next(line.split()[1] for line in told.splitlines() if line.startswith("owner"))
    assert owner in rows[0]


def test_explain_takes_a_request_as_grpcurl_does(stack):
    request = {
        "model_name": "add_sub",
        "inputs": [
            {"name": name, "datatype": "FP32", "shape": [1, 2], "contents": {"fp32_contents": [1, 2]}}
            for name in ("a", "b")
        ],
    }
    first, second = (shown("explain", "--request", "-", "--state", stack.state, text=json.dumps(request)) for _ in "12")
    keys = [line for told in (first, second) for line in told.splitlines() if line.startswith("key")]
    assert len(set(keys)) == 1


def test_explain_says_why_a_model_is_not_cached(stack):
    assert "RandomNormalLike" in shown("explain", "random", "--state", stack.state)


def test_models_lists_each_with_its_state(stack):
    lines = shown("models", "--state", stack.state).splitlines()
    assert any(line.split()[:3] == ["mlp", "1", "ready"] for line in lines)
    assert any(line.startswith("random") and "RandomNormalLike" in line for line in lines)


def test_cache_shows_the_tiers(stack):
    told = shown("cache", "--state", stack.state)
    assert "router" in told
    assert "local" in told
    assert "shared" in told


def test_audit_lists_who_did_what_on_routers_and_workers(stack):
    assert "confirmed it" in shown("cache", "purge", "--model", "mlp", "--state", stack.state)
    newest = shown("audit", "--method", "Purge", "--limit", "1", "--state", stack.state).splitlines()[1]
    assert all(text in newest for text in ("router", "local", "ipv4:127.0.0.1:", "OK", '{"model": "mlp"}'))
    for address in (stack.router, *stack.workers):
        listed = shown("audit", "--since", "2h", "--json", "--method", "Purge", "--address", address).splitlines()
        entry = json.loads(listed[0])
        assert (entry["who"], entry["result"], entry["request"]) == ("local", "OK", {"model": "mlp"})
        assert entry["method"] == "ringmesh.cache.v1.CacheService/Purge"
    assert shown("audit", "--who", "nobody", "--json", "--state", stack.state) == ""


def test_options_before_a_subcommand_apply_to_it(stack, tmp_path):
    assert "mlp" in shown("--state", stack.state, "models")
    assert "confirmed it" in shown("cache", "--state", stack.state, "purge", "--model", "mlp")
    assert "confirmed it" in shown("--state", stack.state, "cache", "purge", "--model", "mlp")
    assert "confirmed it" in shown("cache", "--cache", stack.router, "purge", "--model", "mlp")
    # The option closest to the command takes precedence.
    assert "mlp" in shown("--state", str(tmp_path), "models", "--state", stack.state)


@pytest.mark.parametrize("command", [["top", "--once"], ["explain", "mlp"], ["models"], ["cache"]])
def test_where_no_stack_runs_the_way_to_one_is_told(tmp_path, command):
    assert f"no stack runs in {tmp_path}: `ringmesh up` starts one" in refused(*command, "--state", str(tmp_path))


@pytest.mark.parametrize(
    "command",
    [
        ["top", "--once", "--console"],
        ["explain", "mlp", "--router"],
        ["models", "--router"],
        ["cache", "--cache"],
        ["audit", "--address"],
    ],
)
def test_a_part_that_does_not_answer_is_named(command):
    nowhere = free_address()
    address = f"http://{nowhere}" if "--console" in command else nowhere
    line = refused(*command, address)
    assert nowhere in line
    assert "answers at" in line


def test_what_is_no_request_is_refused_with_its_reason(stack, tmp_path):
    where = ["--state", stack.state]
    assert "not an inference.ModelInferRequest" in refused("explain", "--request", "-", *where, text='{"nme": 1}')
    assert "cannot read" in refused("explain", "--request", str(tmp_path / "none"), *where)
    assert "name a model, or a file" in refused("explain", *where)
    assert "NOT_FOUND" in refused("explain", "no-such-model", *where)


def test_purge_forgets_a_model_and_says_who_confirmed(stack):
    assert "processes confirmed it" in shown("cache", "purge", "--model", "mlp", "--state", stack.state)


def test_purge_of_a_model_that_there_is_not_is_refused_with_the_nearest_name(stack):
    where = ["--state", stack.state]
    told = refused("cache", "purge", "--model", "mpl", *where)
    assert "NOT_FOUND" in told
    assert "did you mean 'mlp'?" in told
    assert "confirmed it" in shown("cache", "purge", "--model", "mpl", "--even-if-unknown", *where)


def test_purge_wants_one_scope(stack):
    where = ["--state", stack.state]
    assert "one of --everything" in refused("cache", "purge", *where)
    assert "one of --everything" in refused("cache", "purge", "--model", "a", "--tenant", "b", *where)
    assert "not hexadecimal" in refused("cache", "purge", "--key", "xyz", *where)


def test_version_says_what_is_installed_and_whether_it_is_compiled():
    assert shown("--version") in [
        f"ringmesh {version('ringmesh-server')} ({kind})\n" for kind in ("compiled", "not compiled")
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ringmesh tr", "trace"),
        ("ringmesh cache pu", "purge"),
        ("ringmesh up --wor", "--workers"),
        ("ringmesh --vers", "--version"),
    ],
)
def test_the_shell_completes_commands_and_options(line, expected):
    asked = {"_RINGMESH_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    binary = Path(sys.executable).parent / "ringmesh"
    done = subprocess.run([binary], env=os.environ | asked, capture_output=True, text=True, timeout=180)
    assert done.stdout.split() == [expected], done.stderr


def test_the_shell_learns_to_complete_from_the_command():
    assert "--install-completion" in shown("--help")


def test_titles_of_processes_show_role_and_address(stack):
    described = json.loads((Path(stack.state) / "stack.json").read_text())
    console = described["console"].removeprefix("http://")
    expected = {"router": f"router {stack.router}", "cache": f"cache {stack.cache}", "console": f"console {console}"}
    expected["ledger"] = f"ledger {described['ledger']}"
    expected |= {f"worker-{number}": f"worker {address}" for number, address in enumerate(stack.workers)}
    processes = {name: psutil.Process(pid) for name, pid in stack.pids.items() if name != "valkey"}
    titles = {name: process.cmdline()[0] for name, process in processes.items()}
    assert titles == {name: f"ringmesh: {title}" for name, title in expected.items()}
    assert psutil.Process(stack.supervisor.pid).cmdline()[0] == f"ringmesh: up {stack.router}"
    # What a process was told can still be read.
    assert processes["router"].environ()["RINGMESH_ADDRESS"] == stack.router
