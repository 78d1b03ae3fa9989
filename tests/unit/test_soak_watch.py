"""What a soak counts at its end."""

import os

from tests.soak import watch


def test_slopes_are_those_of_the_process_since_its_last_start():
    watched = watch.Watch(dict, {}, 30)
    before = [watch.Sample(1, at, (500.0 + at, 9.0, 9.0, 0.0)) for at in range(0, 600, 60)]
    since = [watch.Sample(2, at, (100.0 + at / 100, 9.0, 9.0, 0.0)) for at in range(600, 1200, 60)]
    watched.samples["router-0"] = [*before, *since]
    (median, slope), *_ = watched.slopes()["router-0"]
    assert (round(median, 2), round(slope, 2)) == (108.7, 6.0)
    assert [round(megabytes, 1) for megabytes in watched.memory()["router-0"]] == [107.2, 110.2]


def test_requests_under_way_are_counted_in_processes_that_have_just_started_too(monkeypatch):
    counts = iter([13, 0])
    monkeypatch.setattr(watch, "scrape", lambda _: next(counts))
    monkeypatch.setattr(watch, "value", lambda told, name: told if name == "ringmesh_requests_in_flight" else 0)
    watched = watch.Watch(lambda: {"router-1": os.getpid()}, {"router-1": "127.0.0.1:1"}, 30)
    assert [watched.in_flight(), watched.in_flight()] == [{"router-1": 13}, {"router-1": 0}]
