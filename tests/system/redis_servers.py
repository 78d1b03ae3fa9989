"""Debian's redis-server, as one server, with Sentinels, or as a cluster of three primaries and three replicas."""

import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.ports import free_port
from tests.system.conftest import eventually

needs_redis_server = pytest.mark.skipif(
    not (shutil.which("redis-server") and shutil.which("redis-cli")), reason="Debian's redis-server is not installed"
)


class RedisServer:
    """One process on a free port of 127.0.0.1; `options` as in redis.conf."""

    def __init__(self, folder: Path, *options: str, tls: bool = False, sentinel: bool = False) -> None:
        self.port = free_port()
        self._folder = folder / str(self.port)
        self._folder.mkdir(parents=True)
        ports = ("--port", "0", "--tls-port", str(self.port)) if tls else ("--port", str(self.port))
        common = ("--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(self._folder))
        self._command = ["redis-server", *ports, *common, *options]
        if sentinel:
            config = self._folder / "sentinel.conf"
            config.write_text("\n".join(options) + f"\nport {self.port}\nbind 127.0.0.1\ndir {self._folder}\n")
            self._command = ["redis-server", str(config), "--sentinel"]
        self.start()

    def start(self) -> None:
        with (self._folder / "log").open("a") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log)

    def cli(self, *arguments: str) -> str:
        command = ["redis-cli", "-p", str(self.port), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def wait(self, seconds=60.0) -> None:
        """Until it answers."""
        eventually(lambda: answers(self), seconds)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)


def answers(server: RedisServer) -> bool:
    try:
        return server.cli("ping") == "PONG"
    except AssertionError:
        return False


class RedisCluster:
    """Three primaries, each with a replica."""

    def __init__(self, folder: Path) -> None:
        options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "60000", "--repl-diskless-sync-delay", "0")
        # Not the default, which is the port and 10,000: a stack of another test may have it.
        buses = [free_port() for _ in range(6)]
        self.servers = [RedisServer(folder, *options, "--cluster-port", str(bus)) for bus in buses]
        for server in self.servers:
            server.wait()
        places = [f"127.0.0.1:{server.port}@{bus}" for server, bus in zip(self.servers, buses, strict=True)]
        self.servers[0].cli("--cluster", "create", *places, "--cluster-replicas", "1", "--cluster-yes")
        for server in self.servers:
            eventually(lambda: "cluster_state:ok" in server.cli("cluster", "info"))  # noqa: B023
        eventually(lambda: self._replicas() == 3)

    @property
    def url(self) -> str:
        return f"redis+cluster://{','.join(f'127.0.0.1:{server.port}' for server in self.servers)}"

    def be_quick_to_fail_over(self) -> None:
        """From now on after a second, in which a busy machine may keep a process from answering at all."""
        for server in self.servers:
            server.cli("config", "set", "cluster-node-timeout", "1000")

    def primaries(self) -> list[RedisServer]:
        """As they say themselves."""
        return [s for s in self.servers if s.process.poll() is None and s.cli("role").startswith("master")]

    def _replicas(self) -> int:
        return sum("\nconnected\n" in f"\n{server.cli('role')}\n" for server in self.servers)

    def stop(self) -> None:
        for server in self.servers:
            server.process.kill()
        for server in self.servers:
            server.process.wait()


@pytest.fixture
def redis_cluster(tmp_path):
    cluster = RedisCluster(tmp_path)
    yield cluster
    cluster.stop()


@pytest.fixture
def start_redis(tmp_path):
    """Starts a server of its own: start_redis("--maxmemory", "1mb")."""
    started = []

    def start(*options, **kinds):
        started.append(RedisServer(tmp_path, *options, **kinds))
        return started[-1]

    yield start
    for server in started:
        server.kill()
