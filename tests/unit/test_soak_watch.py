"""What a soak counts at its end."""

import os

from tests.soak import watch


def test_requests_under_way_are_counted_in_processes_that_have_just_started_too(monkeypatch):
    counts = iter([13, 0])
    monkeypatch.setattr(watch, "scrape", lambda _: next(counts))
    monkeypatch.setattr(watch, "value", lambda told, name: told if name == "ringmesh_requests_in_flight" else 0)
    watched = watch.Watch(lambda: {"router-1": os.getpid()}, {"router-1": "127.0.0.1:1"}, 30)
    assert [watched.in_flight(), watched.in_flight()] == [{"router-1": 13}, {"router-1": 0}]
