import io
import json
import logging
import sys
import threading
import time

import pytest

from services.runtime.telemetry.logs import LogFormat, to_stderr
from services.runtime.telemetry.request_log import RequestLog
from tests.unit.clock import Clock


def lines(monkeypatch, style, act, level="INFO"):
    """What stderr gets while `act` runs."""
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    root = logging.getLogger()
    before = root.level
    with to_stderr("router", style, level):
        act()
    root.setLevel(before)
    return stderr.getvalue().splitlines()


def failed(log, **more):
    fields = {
        "code": "UNAVAILABLE",
        "error": "no worker",
        "duration_ns": 1_500_000,
        "trace_id": "ab" * 16,
        "model": "m",
    }
    log.write(**(fields | more))


def test_a_failure_is_one_object_with_its_trace(monkeypatch):
    (line,) = lines(monkeypatch, LogFormat.JSON, lambda: failed(RequestLog(Clock())))
    told = json.loads(line)
    assert (told["level"], told["service"], told["message"]) == ("WARNING", "router", "a request failed")
    assert (told["trace_id"], told["code"], told["duration_ms"]) == ("ab" * 16, "UNAVAILABLE", 1.5)
    assert told["time"].endswith("Z")


def test_a_storm_is_told_by_its_number(monkeypatch):
    clock = Clock()
    log = RequestLog(clock)

    def storm():
        for _ in range(1000):
            failed(log)
        clock.now = 10.0
        failed(log)

    found = [json.loads(line) for line in lines(monkeypatch, LogFormat.JSON, storm)]
    assert len(found) == 21
    assert found[-1]["suppressed"] == 980
    (sample,) = log.samples()
    assert sample.value == 980


@pytest.mark.parametrize(
    ("code", "level", "message"),
    [
        ("INTERNAL", "WARNING", "a request failed"),
        ("INVALID_ARGUMENT", "INFO", "a request failed"),
        ("OK", "INFO", "a request was slow"),
    ],
)
def test_the_level_says_whose_fault_it_is(monkeypatch, code, level, message):
    (line,) = lines(monkeypatch, LogFormat.JSON, lambda: failed(RequestLog(Clock()), code=code))
    assert (json.loads(line)["level"], json.loads(line)["message"]) == (level, message)


def test_no_caller_begins_a_line_of_its_own(monkeypatch):
    act = lambda: failed(RequestLog(Clock()), error="no model 'x\n2026 INFO all is well'")  # noqa: E731
    (line,) = lines(monkeypatch, LogFormat.TEXT, act)
    assert "WARNING router" in line
    assert "code=UNAVAILABLE" in line
    assert "\\n2026 INFO" in line


def test_a_stack_is_in_the_object_of_its_line(monkeypatch):
    def act():
        try:
            raise ValueError("boom")
        except ValueError:
            logging.getLogger("x").exception("it failed")

    (line,) = lines(monkeypatch, LogFormat.JSON, act)
    assert "ValueError: boom" in json.loads(line)["exception"]


def test_a_reader_that_does_not_read_holds_nobody_up(monkeypatch):
    read = threading.Event()

    class Stuck(io.StringIO):
        def write(self, text):
            read.wait()
            return super().write(text)

    monkeypatch.setattr(sys, "stderr", stderr := Stuck())
    with to_stderr("router", LogFormat.JSON, "INFO"):
        for _ in range(30_000):
            logging.getLogger("x").warning("line")
        read.set()
        give_up = time.monotonic() + 60
        while stderr.getvalue().count("\n") < 10_000 and time.monotonic() < give_up:
            time.sleep(0.01)
    assert 10_000 <= stderr.getvalue().count("\n") <= 10_001
