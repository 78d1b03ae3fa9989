"""Scrapes /metrics of every process into the history."""

from __future__ import annotations

import asyncio
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPException

from services.console.data.exposition_reader import ExpositionReader
from services.console.data.history import History
from services.runtime.rpc.service_tls import ServiceTls
from services.runtime.telemetry.supervisor import BACKGROUND

PERIOD_SECONDS = 2.0
_TIMEOUT = 2.0
_MAX_BYTES = 8 << 20


class Scraper:
    """Scrapes `targets`: host:port by process name; with `tls`, by mutual TLS. `problems` has the reason for each
    process that does not answer."""

    def __init__(self, targets: Mapping[str, str], history: History, tls: ServiceTls | None = None) -> None:
        self.problems: dict[str, str] = {}
        self.targets = targets
        self._history = history
        self._tls = tls
        # One thread per process, mostly waiting on a socket, so that a hanging process does not delay the others.
        self._threads = ThreadPoolExecutor(max(1, len(targets)), thread_name_prefix="scrape")
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [BACKGROUND.start("scrape", partial(self._run, name)) for name in self.targets]

    def close(self) -> None:
        """Stops without waiting for scrapes in progress."""
        for task in self._tasks:
            task.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, name: str) -> None:
        loop = asyncio.get_running_loop()
        reader = ExpositionReader()
        while True:
            start = loop.time()
            context = self._tls.context if self._tls is not None else None
            try:
                text = await loop.run_in_executor(self._threads, fetch, self.targets[name], context)
                samples = await loop.run_in_executor(self._threads, reader.read, text)
                self._history.add(name, samples)
                self.problems.pop(name, None)
            except (OSError, ValueError, HTTPException) as error:
                self.problems[name] = f"no metrics from {self.targets[name]}: {_reason(error)}"
            await asyncio.sleep(max(0.1, start + PERIOD_SECONDS - loop.time()))


def fetch(address: str, context: ssl.SSLContext | None = None) -> str:
    """Reads one scrape; by TLS, with a context. Raises OSError if the process does not answer, ValueError if it is not
    text or too large."""
    # Calls between processes of one fleet must not use a proxy from the environment.
    handlers = [urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)]
    opener = urllib.request.build_opener(*handlers)
    with opener.open(f"http{'s' if context else ''}://{address}/metrics", timeout=_TIMEOUT) as response:
        text: bytes = response.read(_MAX_BYTES + 1)
    if len(text) > _MAX_BYTES:
        raise ValueError(f"the answer is larger than {_MAX_BYTES >> 20} MiB")
    return text.decode()


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.URLError):
        return str(error.reason)
    return str(error) or type(error).__name__
