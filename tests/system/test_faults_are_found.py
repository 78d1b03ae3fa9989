"""Faults under load, as somebody finds them who sees nothing but the console, Prometheus and its alerts."""

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from html import unescape
from pathlib import Path

import grpc
import numpy as np
import pytest
import yaml
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from tests.models import slow
from tests.system.conftest import start_stack, stop_stack
from tests.system.processes import free_address

# Alone: beside other tests, the worker that is held up is not slower than the other for long enough.
pytestmark = [pytest.mark.proof, pytest.mark.alone]
RULES = Path(__file__).parents[2] / "deploy/prometheus/rules.yml"
SECONDS = 120.0


class Slowed:
    """A process that gets the CPU for 4 of 16 ms, as behind a greedy neighbour."""

    def __init__(self, pid):
        self._pid = pid
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        for _ in range(8000):
            os.kill(self._pid, signal.SIGSTOP)
            self._done.wait(0.012)
            os.kill(self._pid, signal.SIGCONT)
            if self._done.wait(0.004):
                return

    def end(self):
        self._done.set()
        self._thread.join()


class Load:
    """Requests of two tenants that no cache answers; those of `acme` name an input that the model does not have."""

    def __init__(self, router):
        self.unexpected = []
        self._router = router
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(tenant,)) for tenant in ("acme", "good")]
        for thread in self._threads:
            thread.start()

    def _run(self, tenant):
        rng = np.random.default_rng()
        with grpc.insecure_channel(self._router) as channel:
            infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            for _ in range(20_000):
                if self._done.wait(0.02):
                    return
                request = v2.ModelInferRequest(model_name="steady")
                request.inputs.add(name="wrong" if tenant == "acme" else "x", datatype="FP32", shape=[1, 1])
                request.raw_input_contents.append(rng.normal(size=(1, 1)).astype(np.float32).tobytes())
                try:
                    infer(request.SerializeToString(), metadata=(("ringmesh-tenant", tenant),), timeout=60)
                except grpc.RpcError as error:
                    if tenant != "acme":
                        self.unexpected.append(str(error.details()))

    def end(self):
        self._done.set()
        for thread in self._threads:
            thread.join()


class Prometheus:
    """The real one with our rules, each window and delay of them as short as some scrapes."""

    def __init__(self, folder, targets):
        rules = re.sub(r"\[\d+[mhd]\]", "[6s]", RULES.read_text())
        rules = re.sub(r"for: \w+", "for: 1s", re.sub(r"interval: \w+", "interval: 1s", rules))
        (folder / "rules.yml").write_text(rules)
        jobs = [{"targets": [where], "labels": {"process": name}} for name, where in targets.items()]
        relabel = [{"source_labels": ["process"], "target_label": "instance"}]
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yml"],
            "scrape_configs": [{"job_name": "ringmesh", "static_configs": jobs, "relabel_configs": relabel}],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self.address = free_address()
        self._process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={self.address}",
                "--log.level=error",
            ]
        )

    def firing(self):
        """{alert: [labels]}"""
        try:
            with urllib.request.urlopen(f"http://{self.address}/api/v1/alerts", timeout=60) as answer:
                found = json.load(answer)["data"]["alerts"]
        except OSError:
            return {}
        firing = {}
        for alert in found:
            if alert["state"] == "firing":
                firing.setdefault(alert["labels"]["alertname"], []).append(alert["labels"])
        return firing

    def end(self):
        self._process.terminate()
        self._process.wait(60)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A model of some 8 ms: a worker that is held up is so while it runs."""
    repository = tmp_path_factory.mktemp("found-models")
    slow(repository, trips=20, name="steady")
    return repository


@pytest.fixture
def stack(models, tmp_path):
    # So that Redis is down only while it is stopped.
    settings = {"shared_budget_seconds": "1"}
    running = start_stack(tmp_path / "state", "--models", str(models), "--drain", "2", **settings)
    yield running
    assert stop_stack(running) == 0


def until(condition, what):
    give_up = time.monotonic() + SECONDS
    while not (found := condition()):
        assert time.monotonic() < give_up, f"not within {SECONDS:.0f} s: {what()}"
        time.sleep(0.5)
    return found


def page(url):
    """Its text, without its tags."""
    with urllib.request.urlopen(url, timeout=60) as answer:
        return " ".join(unescape(re.sub(r"<[^>]+>", " ", answer.read().decode())).split())


def findings(console):
    """The items of “Needs attention”, as text."""
    with urllib.request.urlopen(f"{console}/", timeout=60) as answer:
        items = re.findall(r'<li class="(?:critical|warning|note)">(.*?)</li>', answer.read().decode(), re.DOTALL)
    return [" ".join(unescape(re.sub(r"<[^>]+>", " ", item)).split()) for item in items]


@pytest.mark.skipif(not shutil.which("prometheus"), reason="needs Debian's package prometheus")
def test_each_fault_is_named_and_located_and_pages_where_it_should(stack, tmp_path):
    description = json.loads((Path(stack.state) / "stack.json").read_text())
    console, pids = description["console"], description["processes"]
    prometheus = Prometheus(tmp_path, description["metrics"])
    load = Load(stack.router)
    slowed = None
    try:
        until(lambda: any("INVALID_ARGUMENT" in one for one in findings(console)), lambda: findings(console))
        assert not any("Redis" in one for one in findings(console))

        # The three faults at once; the bad inputs have been there from the start.
        slowed = Slowed(pids["worker-1"])
        os.kill(pids["valkey"], signal.SIGSTOP)
        expected = {
            "slow worker": ("Worker is slow", "worker worker-1", "times as long"),
            "dead Redis": ("Redis is down", "shared cache tier, seen by", "router"),
            "bad inputs": (
                "Requests are refused",
                "model steady, tenant acme",
                "has no input 'wrong'; it has 'x'",
            ),
        }

        def all_named():
            found = findings(console)
            return all(any(all(word in one for word in words) for one in found) for words in expected.values())

        until(all_named, lambda: findings(console))

        def all_fire():
            firing = prometheus.firing()
            return (
                any(labels["instance"] == "worker-1" for labels in firing.get("RingmeshWorkerSlow", ()))
                and any(labels["instance"] == "router" for labels in firing.get("RingmeshRedisDown", ()))
                and any(
                    (labels["model"], labels["tenant"], labels["code"]) == ("steady", "acme", "INVALID_ARGUMENT")
                    for labels in firing.get("RingmeshCallersRefused", ())
                )
            )

        until(all_fire, prometheus.firing)
        firing = prometheus.firing()
        # What callers do wrong is no outage of ours, and pages nobody.
        assert "RingmeshUnavailable" not in firing
        assert {labels["severity"] for labels in firing["RingmeshWorkerSlow"] + firing["RingmeshRedisDown"]} == {"page"}
        assert {labels["severity"] for labels in firing["RingmeshCallersRefused"]} == {"ticket"}

        # From the finding to the cause: the pages that it links to.
        assert "down, skipped" in page(f"{console}/cache")
        query = urllib.parse.urlencode({"status": "error", "model": "steady", "tenant": "acme"})
        assert "has no input 'wrong'; it has 'x'" in page(f"{console}/traces?{query}")
        assert load.unexpected == []
    finally:
        load.end()
        if slowed is not None:
            slowed.end()
        os.kill(pids["valkey"], signal.SIGCONT)
        prometheus.end()


def test_a_router_that_is_gone_is_named_and_so_is_its_return(stack):
    description = json.loads((Path(stack.state) / "stack.json").read_text())
    console, pid = description["console"], description["processes"]["router"]
    until(lambda: "2 of 2 workers" in page(f"{console}/"), lambda: page(f"{console}/"))
    assert not any("Router is down" in one for one in findings(console))
    os.kill(pid, signal.SIGSTOP)
    until(
        lambda: any("Router is down" in one and stack.router in one for one in findings(console)),
        lambda: findings(console),
    )
    assert "No router answers" in page(f"{console}/")
    assert "No router answers" in page(f"{console}/try")
    os.kill(pid, signal.SIGCONT)
    until(lambda: not any("Router is down" in one for one in findings(console)), lambda: findings(console))
