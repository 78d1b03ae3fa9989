import pytest
from ringmesh.inference.v1 import inference_pb2

from services.inference.scheduling.load import Load
from tests.unit.clock import Clock
from tests.unit.router.fleets import MODEL, member, view


def test_an_idle_worker_has_no_wait():
    load = Load(Clock())
    load.started()
    load.ended()
    assert (load.requests, load.estimated_wait) == (0, 0.0)


def test_the_wait_is_what_is_outstanding_times_the_time_between_answers():
    clock = Clock()
    load = Load(clock)
    for _ in range(200):
        load.started()
        clock.now += 0.1
        load.ended()
        clock.now += 5.0  # idle: no part of it
    for _ in range(4):
        load.started()
    assert load.estimated_wait == pytest.approx(0.4)


def test_a_worker_that_answers_in_batches_waits_as_long_as_one_that_answers_each():
    clock = Clock()
    load = Load(clock)
    for _ in range(50):
        for _ in range(16):
            load.started()
        clock.now += 0.16
        for _ in range(16):
            load.ended()
    for _ in range(10):
        load.started()
    assert load.estimated_wait == pytest.approx(0.1, rel=0.3)


def test_a_worker_that_is_stuck_waits_as_long_as_it_has_been():
    clock = Clock()
    load = Load(clock)
    load.started()
    clock.now += 60
    assert load.estimated_wait == 60


def test_a_pool_counts_what_each_of_its_workers_has():
    seen = view([member("a"), member("b"), member("c", holds=False)])
    pool = seen.pool(MODEL)
    loads = {name: made.load for name, made in seen.members.items()}
    loads["a"].sent()
    loads["b"].sent()
    loads["c"].sent()
    # One of the five from here, so four from other routers.
    loads["b"].reported(inference_pb2.LoadReport(requests=5), 1)
    assert (loads["a"].outstanding, loads["b"].outstanding, pool.load) == (1, 5, 6)
    loads["a"].ended()
    loads["b"].reported(inference_pb2.LoadReport(requests=1), 1)
    assert (loads["b"].outstanding, loads["b"].in_flight, pool.load) == (1, 1, 1)


def test_bounds_follow_the_weights_and_add_up_to_more_than_the_load():
    seen = view([member("a", weight=1.0), member("b", weight=3.0)])
    pool = seen.pool(MODEL)
    for _ in range(100):
        seen.members["b"].load.sent()
    bounds = {name: pool.bound(made) for name, made in seen.members.items()}
    assert bounds["b"] == pytest.approx(3 * bounds["a"], abs=3)
    assert sum(bounds.values()) > 101
