"""Runs one service process: logging, event loop, signals, and one-line start errors."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from typing import NoReturn, TypeVar

import uvloop
from pydantic import ValidationError
from setproctitle import setproctitle

from services.runtime.machine import memory
from services.runtime.process import variables
from services.runtime.process.settings import ServiceSettings, describe
from services.runtime.rpc.exposition import MetricsServer
from services.runtime.rpc.server import StartError
from services.runtime.rpc.tls import TlsError
from services.runtime.telemetry import metrics_export
from services.runtime.telemetry.logs import to_stderr
from services.runtime.telemetry.metrics import Metrics
from services.runtime.telemetry.process_metrics import ProcessMetrics
from services.runtime.telemetry.spans import Process
from services.runtime.telemetry.supervisor import BACKGROUND

log = logging.getLogger(__name__)

Settings = TypeVar("Settings", bound=ServiceSettings)


def run(settings_type: type[Settings], serve: Callable[[Settings, asyncio.Event], Awaitable[None]]) -> NoReturn:
    """Reads the settings and runs `serve` until it returns; SIGTERM and SIGINT set its event.

    Exits with 0 after a drain, and with 2 if it could not start.
    """

    async def main(settings: Settings) -> None:
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
        try:
            await serve(settings, stopping)
        finally:
            await BACKGROUND.close()

    name = settings_type.section
    keep_files_private()
    memory.keep_large_buffers()
    try:
        settings = settings_type()
        with to_stderr(name, settings.log_format, settings.log_level):
            for message in variables.unknown(os.environ):
                log.warning("%s", message)
            uvloop.run(main(settings))
    except (ValidationError, StartError, TlsError) as error:
        print(f"{name}: {describe(error) if isinstance(error, ValidationError) else error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


async def publish(settings: ServiceSettings, metrics: Metrics, exporter: Process | None = None) -> MetricsServer:
    """Serves `metrics` and those of the process itself, by mutual TLS if services call each other so. With `exporter`,
    also sends them to the OTLP endpoint, if any.

    Raises StartError and TlsError.
    """
    metrics.add(BACKGROUND.samples)
    exposition = MetricsServer(settings.metrics_address, metrics, settings.service_files())
    await exposition.start()
    ProcessMetrics(settings.section, settings.engine, metrics).start()
    if exporter is not None and settings.otlp_endpoint is not None:
        BACKGROUND.start("metrics export", partial(metrics_export.export, settings.otlp_endpoint, exporter, metrics))
    return exposition


def keep_files_private() -> None:
    """From now on, this process and its children create files that only their user can read: 0600, folders 0700."""
    os.umask(0o077)


def set_title(role: str, address: str, port: int = 0) -> None:
    """Sets the title of this process in `ps`; `port` is the port in use if `address`, host:port, leaves it open."""
    # Keeps /proc's view of the environment intact.
    os.environ.setdefault("SPT_NOENV", "1")
    host, _, configured = address.rpartition(":")
    setproctitle(f"ringmesh: {role} {host}:{configured if host == 'unix' else port or configured}")
