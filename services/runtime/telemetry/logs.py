"""The log of a process: lines on stderr, for people or as JSON, written on a thread of its own.

A reader that stops reading costs lines, never requests: the event loop does not wait for stderr.
"""

from __future__ import annotations

import json
import logging
import queue
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from logging.handlers import QueueHandler

_QUEUED_LINES = 10_000
_CLOSE_SECONDS = 1.0
# Of a LogRecord: `extra={FIELDS: {...}}` says more of what happened, by name.
FIELDS = "ringmesh"


class LogFormat(StrEnum):
    """How a line looks."""

    TEXT = "text"
    JSON = "json"


class _Queue(QueueHandler):
    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            return

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        # The rest of the formatting is the thread's.
        record.msg, record.args = record.getMessage(), None
        return record


class JsonFormatter(logging.Formatter):
    """One object a line."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """Times in UTC with milliseconds."""
        second = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        told = {
            "time": f"{second}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told, default=str)


class TextFormatter(logging.Formatter):
    """A line for people; what a caller sent cannot begin a line of its own."""

    def __init__(self, service: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {service} %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802, the name is logging's
        """The message, then its fields as name=value."""
        fields = getattr(record, FIELDS, {})
        more = "".join(f" {name}={value}" for name, value in fields.items() if value not in ("", None))
        return (super().formatMessage(record) + more).replace("\r", "\\r").replace("\n", "\\n")


@contextmanager
def to_stderr(service: str, style: LogFormat, level: str) -> Iterator[None]:
    """While it lasts, what this process logs goes to stderr; at its end what waits is written."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(service) if style is LogFormat.JSON else TextFormatter(service))
    lines: queue.Queue[logging.LogRecord | None] = queue.Queue(_QUEUED_LINES)
    writer = threading.Thread(target=_write, args=(lines, handler), name="log", daemon=True)
    writer.start()
    root = logging.getLogger()
    root.setLevel(level)
    root.addHandler(front := _Queue(lines))
    try:
        yield
    finally:
        root.removeHandler(front)
        with suppress(queue.Full):
            lines.put(None, timeout=_CLOSE_SECONDS)
        writer.join(_CLOSE_SECONDS)


def _write(lines: queue.Queue[logging.LogRecord | None], handler: logging.Handler) -> None:
    while (record := lines.get()) is not None:
        handler.handle(record)
