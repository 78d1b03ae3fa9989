"""Routers and workers started one by one, for tests that break them."""

import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
from ringmesh.health.v1 import health_pb2, health_pb2_grpc

from tests.ports import free_port

KEY_SECRET = "of all that tests start"
# Unless a test is about them: on a busy machine look-ups in Redis would be given up and requests refused, and the audit
# computes any hit again.
STEADY = {"shared_budget_seconds": "5", "queue_seconds": "600", "audit_share": "0"}
_STATE = tempfile.TemporaryDirectory(prefix="ringmesh-tests-", ignore_cleanup_errors=True)
_NUMBERS = itertools.count()


@dataclass
class Started:
    address: str
    process: subprocess.Popen

    @property
    def info(self) -> psutil.Process:
        """What the system knows of it."""
        return psutil.Process(self.process.pid)


def free_address() -> str:
    return f"127.0.0.1:{free_port()}"


def start(module: str, *, within: Sequence[str] = (), service: str = "", **settings) -> Started:
    """Starts `python -m module` with RINGMESH_* settings and waits until `service` is SERVING, "": all of it.

    `within` is a command that runs it, such as that of a network namespace.
    """
    settings = STEADY | settings
    settings.setdefault("address", free_address())
    # Each its own: an address that is free again would find what was decided there before.
    settings.setdefault("state_dir", Path(_STATE.name, str(next(_NUMBERS))))
    settings.setdefault("key_secret", KEY_SECRET)
    settings.setdefault("metrics_address", "127.0.0.1:0")
    environment = {f"RINGMESH_{name.upper()}": str(value) for name, value in settings.items() if value is not None}
    process = subprocess.Popen([*within, sys.executable, "-P", "-m", module], env={**os.environ, **environment})
    started = Started(settings["address"], process)
    give_up = time.monotonic() + 120
    with grpc.insecure_channel(started.address, options=[("grpc.max_reconnect_backoff_ms", 100)]) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        while True:
            try:
                if health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status == 1:
                    return started
            except grpc.RpcError:
                pass
            if process.poll() is not None or time.monotonic() > give_up:
                process.kill()
                raise AssertionError(f"{module} did not come up: exit code {process.poll()}")
            time.sleep(0.02)


def stop(*started: Started) -> None:
    for one in started:
        one.process.terminate()
    for one in started:
        try:
            one.process.wait(30)
        except subprocess.TimeoutExpired:
            one.process.kill()
            one.process.wait()


def kill(*started: Started) -> None:
    """At once, for what a test has no more use for: how a process stops is proven where it is the subject."""
    for one in started:
        one.process.kill()
    for one in started:
        one.process.wait()
