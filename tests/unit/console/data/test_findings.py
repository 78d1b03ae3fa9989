"""What the console's first page says needs attention: each fault once, however many parts meet it."""

from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.trace.v1 import trace_pb2
from ringmesh.router.v1 import router_pb2

from services.console.data import findings
from services.console.data.fleet_watch import FleetSnapshot, ModelView, ServiceView
from services.console.data.history import History
from services.console.data.trace_store import TraceStore
from tests.unit.console.data.test_history import sample


def view(*, workers=(), models=()):
    router = ServiceView("r:1", workers=tuple(workers) or (router_pb2.Worker(id="w", healthy=True),), problem="")
    return FleetSnapshot((router,), ServiceView("c:1", problem=""), tuple(models))


def refusals(models, code="INVALID_ARGUMENT", outcome="error"):
    """A history in which each of `models` refused its only tenant twice."""
    now = [1000.0]
    history = History(lambda: now[0])
    for count in (0, 2):
        labels = [{"model": model, "tenant": "acme", "code": code, "outcome": outcome} for model in models]
        history.add("router", [sample("ringmesh_requests_total", of, count) for of in labels])
        now[0] += 2
    return history


def test_what_a_limit_of_the_caller_refuses_is_a_note():
    store = traces(("m", "RESOURCE_EXHAUSTED", "the budget of tenant 'acme' is used up"))
    (found,) = findings.find(view(), refusals(["m"], "RESOURCE_EXHAUSTED", "refused"), store, {})
    assert (found.severity, found.title, found.where) == (
        "note", "Requests are refused by a limit of their caller", "model m, tenant acme",
    )  # fmt: skip
    assert "the budget of tenant 'acme' is used up" in found.detail
    (found,) = findings.find(view(), refusals(["m"], "RESOURCE_EXHAUSTED"), store, {})
    assert (found.severity, found.title) == ("critical", "Requests fail")


def traces(*failures):
    """A store with a failed trace of each (model, code, message)."""
    store = TraceStore(max_bytes=1 << 20, max_traces=100)
    for number, (model, code, message) in enumerate(failures, 1):
        told = {"ringmesh.model.name": model, "rpc.response.status_code": code}
        attributes = [
            common_pb2.KeyValue(key=key, value=common_pb2.AnyValue(string_value=value)) for key, value in told.items()
        ]
        span = trace_pb2.Span(
            trace_id=bytes([number]) * 16,
            span_id=bytes([number]) * 8,
            kind=trace_pb2.Span.SPAN_KIND_SERVER,
            start_time_unix_nano=number,
            attributes=attributes,
            status=trace_pb2.Status(code=trace_pb2.Status.STATUS_CODE_ERROR, message=message),
        )
        store.add("ringmesh-router", span)
    return store


def test_one_caller_who_is_refused_by_many_models_is_one_finding():
    models = [f"m{number}" for number in range(9)]
    (found,) = findings.find(view(), refusals(models), traces(), {})
    assert found.where == "models m0, m1, m2, m3, m4 and 4 more, tenant acme"
    assert "18 requests" in found.detail
    assert "text=INVALID_ARGUMENT" in found.link


def test_a_few_models_are_told_of_one_by_one():
    found = findings.find(view(), refusals(["a", "b"]), traces(), {})
    assert [one.where for one in found] == ["model a, tenant acme", "model b, tenant acme"]


def test_what_was_said_last_is_of_the_same_failure():
    store = traces(
        ("typo", "NOT_FOUND", "no model 'typo'"),
        ("a", "INVALID_ARGUMENT", "no input 'z'"),
        ("a", "UNAVAILABLE", "no worker"),
    )
    (unknown,) = findings.find(view(), refusals(["other"], "NOT_FOUND"), store, {})
    assert unknown.where == "models that are unknown or not served, tenant acme"
    assert unknown.detail.endswith("The last message: no model 'typo'")
    (wrong,) = findings.find(view(), refusals(["a"]), store, {})
    assert wrong.detail.endswith("The last message: no input 'z'")


def test_a_fleet_that_is_down_is_one_finding_and_so_are_its_models():
    workers = [router_pb2.Worker(id=f"w{number}", address=f"h:{number}", reason="lost") for number in range(20)]
    models = [ModelView(f"m{number}", "1", "UNAVAILABLE", "no file") for number in range(200)]
    found = findings.find(view(workers=workers, models=models), refusals([]), traces(), {})
    assert [(one.title, one.where) for one in found] == [
        ("Workers get no requests", "workers w0, w1, w2, w3, w4 and 15 more"),
        ("Models are not served", "models m0 1, m1 1, m2 1, m3 1, m4 1 and 195 more"),
    ]
    assert "No worker is left" in found[0].detail


def stalls(attempts):
    """Workers that each computed for 1 ms a request, and the seconds that 100 attempts took on each."""
    now = [1000.0]
    history = History(lambda: now[0])
    for count in (0, 100):
        for worker, took in attempts.items():
            stage = {"model": "m", "version": "1", "stage": "compute"}
            history.add(
                worker,
                [
                    sample("ringmesh_worker_stage_seconds_sum", stage, count * 1e-3),
                    sample("ringmesh_worker_stage_seconds_count", stage, count),
                ],
            )
            sums = [sample(f"ringmesh_attempt_duration_seconds_{part}", {"worker": worker}, value)
                    for part, value in (("sum", took * count / 100), ("count", count))]  # fmt: skip
            history.add(f"router of {worker}", sums)
        now[0] += 2
    return history


def test_a_worker_that_gets_no_cpu_between_two_requests_is_found_by_how_late_its_answers_come():
    (found,) = findings.find(view(), stalls({"w0": 0.2, "w1": 2.1, "w2": 0.2}), traces(), {})
    assert (found.title, found.where) == ("Worker is slow", "worker w1")
    assert "its answers take 20 ms beyond its work, 1 ms on the others" in found.detail
    assert findings.find(view(), stalls({"w0": 0.2, "w1": 0.3}), traces(), {}) == []
    assert findings.find(view(), stalls({"alone": 9.0}), traces(), {}) == []


def test_work_in_the_background_that_fails_is_told_with_its_reason():
    history = History(lambda: 1000.0)
    labels = {"task": "discovery", "reason": "ValueError: no"}
    history.add("router", [sample("ringmesh_background_failing", labels, 1)])
    (found,) = findings.find(view(), history, traces(), {})
    assert (found.where, found.title) == ("router", "Background task fails")
    assert "'discovery' keeps failing" in found.detail
    assert "ValueError: no" in found.detail
