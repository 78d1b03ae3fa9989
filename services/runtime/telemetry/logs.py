"""The log of a process: lines on stderr, as text or JSON, written by a thread of its own.

If the reader of stderr stalls, lines are dropped and requests go on: the event loop never waits for stderr.
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
# Attribute of a LogRecord: `extra={FIELDS: {...}}` adds named fields to the line.
FIELDS = "ringmesh"


class LogFormat(StrEnum):
    """The format of a log line."""

    TEXT = "text"
    JSON = "json"


class _Queue(QueueHandler):
    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            return

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        # The writing thread does the rest of the formatting.
        record.msg, record.args = record.getMessage(), None
        return record


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object a line."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line; its time is in UTC with milliseconds."""
        second = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields = {
            "time": f"{second}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


class TextFormatter(logging.Formatter):
    """Formats a record as one line of text; line breaks in it are escaped, so a caller's text cannot start a line."""

    def __init__(self, service: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {service} %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802, the name is logging's
        fields = getattr(record, FIELDS, {})
        more = "".join(f" {name}={value}" for name, value in fields.items() if value not in ("", None))
        return (super().formatMessage(record) + more).replace("\r", "\\r").replace("\n", "\\n")


@contextmanager
def to_stderr(service: str, style: LogFormat, level: str) -> Iterator[None]:
    """Sends this process's log to stderr within the context; at its end, queued lines are written."""
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
