"""The console in a real browser: on a desk and on a phone, light and dark, by keyboard, and live.

RINGMESH_SCREENSHOTS=1 writes what it sees to docs/images.
"""

import contextlib
import json
import os
import signal
import threading
from pathlib import Path

import grpc
import numpy as np
import pytest
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.runtime.w3c import new_span_id
from tests import models
from tests.system.browser import ENTER, LEFT, TAB, Browser, is_here
from tests.system.conftest import start_stack, stop_stack

pytestmark = [
    pytest.mark.proof,
    pytest.mark.skipif(not is_here(), reason="needs Debian's chromium and chromium-driver"),
]
IMAGES = Path(__file__).parents[2] / "docs/images"
# The busiest first.
RANKED = ("search-rank", "fraud-score", "ad-quality", "feed-rank", "video-rank")
PAGES = [
    "/",
    "/models",
    "/models/search-rank",
    "/models/pipeline?by=worker",
    "/models/churn-forecast",
    "/workers/worker-0?range=2+h",
    "/cache",
    "/traces",
    "/objectives",
    "/cost",
    "/try?model=search-rank",
    "/nowhere",
]
DESK, PHONE = (1280, 860), (375, 740)
# Rows of charts that do not fill the width of their grid.
GAPS = """
const found = [];
for (const grid of document.querySelectorAll('.charts')) {
  const box = grid.getBoundingClientRect(), rights = {};
  for (const chart of grid.children) {
    const { top, right } = chart.getBoundingClientRect();
    rights[top] = Math.max(rights[top] || 0, right);
  }
  for (const right of Object.values(rights)) if (right < box.right - 1) found.push(box.right - right);
}
return found;
"""

# Elements whose text stands out less from what is behind it than WCAG AA asks for (4.5, large text 3).
FAINT = """
const linear = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = rgb => rgb.map(v => linear(v / 255))
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
const painted = new Map();
const over = (color, below) => {  // paints one on the other, as the browser does
  const key = color + below;
  if (!painted.has(key)) painted.set(key, paint(color, below));
  return painted.get(key);
};
const paint = (color, below) => {
  canvas.fillStyle = `rgb(${below})`; canvas.fillRect(0, 0, 1, 1);
  canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
const behind = e => {
  const chain = [];
  for (; e; e = e.parentElement) chain.push(getComputedStyle(e).backgroundColor);
  return chain.reverse().reduce((below, color) => over(color, below), [255, 255, 255]);
};
const found = [];
for (const e of document.querySelectorAll('body *')) {
  if (e.closest('svg') && e.tagName !== 'text') continue;
  if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || !e.getClientRects().length) continue;
  const style = getComputedStyle(e);
  let back = behind(e.closest('svg') ? e.closest('svg').parentElement : e);
  const arc = e.closest('g.arc');
  if (arc) back = over(getComputedStyle(arc.querySelector('path')).fill, back);
  const a = light(over(arc || e.closest('svg') ? style.fill : style.color, back)), b = light(back);
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
  if (ratio < (large ? 3 : 4.5)) found.push(`${e.tagName} "${e.textContent.trim().slice(0, 30)}" ${ratio.toFixed(2)}`);
}
return found;
"""
# What somebody who does not see the page, or has no mouse, would miss.
UNNAMED = """
const found = [];
for (const e of document.querySelectorAll('input:not([type=hidden]), select, textarea'))
  if (!e.labels.length || !e.labels[0].textContent.trim()) found.push('no label: ' + e.outerHTML.slice(0, 80));
for (const e of document.querySelectorAll('a, button'))
  if (!e.textContent.trim() && !e.getAttribute('aria-label')) found.push('no name: ' + e.outerHTML.slice(0, 80));
for (const e of document.querySelectorAll('svg'))
  if (e.getAttribute('aria-hidden') !== 'true' && !(e.getAttribute('role') === 'img' && e.getAttribute('aria-label')))
    found.push('no words for ' + e.outerHTML.slice(0, 80));
for (const e of document.querySelectorAll('.scroll'))
  if (e.tabIndex !== 0 || !e.getAttribute('aria-label')) found.push('not reached by keys: ' + e.outerHTML.slice(0, 80));
for (const [css, count] of [['h1', 1], ['main', 1], ['nav[aria-label]', 1], ['html[lang]', 1]])
  if (document.querySelectorAll(css).length !== count) found.push(`not ${count} ${css}`);
const ids = [...document.querySelectorAll('[id]')].map(e => e.id);
for (const id of ids) if (ids.indexOf(id) !== ids.lastIndexOf(id)) found.push('twice: ' + id);
return found;
"""


def infer(stub, model, *, tenant="", wrong=False, value=1.0, sampled=False):
    request = v2.ModelInferRequest(model_name=model)
    request.inputs.add(name="z" if wrong else "x", datatype="FP32", shape=[1, 64])
    request.raw_input_contents.append(np.full((1, 64), value, np.float32).tobytes())
    metadata = [("ringmesh-tenant", tenant)]
    if sampled:
        metadata.append(("traceparent", f"00-{new_span_id() * 2}-{new_span_id()}-01"))
    with contextlib.suppress(grpc.RpcError):
        stub(request.SerializeToString(), metadata=metadata, timeout=10)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """As a company has them; one is not cached, and one cannot be loaded."""
    folder = tmp_path_factory.mktemp("company")
    for seed, name in enumerate(RANKED):
        models.mlp(folder, seed=seed, name=name)
    models.mlp(folder, seed=9, version=2, name="fraud-score")
    models.random(folder)
    models.slow(folder, name="summaries")
    models.mlp(folder)
    models.pipeline(folder)
    broken = folder / "churn-forecast/1"
    broken.mkdir(parents=True)
    (broken / "model.onnx").write_bytes(b"a half-written export")
    return folder


@pytest.fixture(scope="module")
def stack(repository, tmp_path_factory):
    """A stack under a light load of three tenants, so that its console has something to show."""
    stack = start_stack(
        tmp_path_factory.mktemp("browser"), "--models", str(repository), "--workers", "3", "--drain", "2"
    )
    done = threading.Event()

    def load():
        rng = np.random.default_rng(1)
        with grpc.insecure_channel(stack.router) as channel:
            stub = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            for number in range(20_000):
                if done.wait(0.01):
                    return
                tenant = ("search", "ads", "payments")[number % 3]
                model = RANKED[min(int(rng.zipf(1.6)), len(RANKED)) - 1]
                value = float(rng.zipf(1.4) % 1000)
                wrong = tenant == "ads" and number % 20 == 1
                infer(stub, model, tenant=tenant, value=value, wrong=wrong, sampled=number % 5 == 0)

    thread = threading.Thread(target=load)
    thread.start()
    yield stack
    done.set()
    thread.join()
    assert stop_stack(stack) == 0


@pytest.fixture(scope="module")
def router(stack):
    return stack.router


@pytest.fixture(scope="module")
def browser(console, tmp_path_factory):
    window = Browser(tmp_path_factory.mktemp("chromium"))
    window.look(*DESK)
    window.open(f"{console}/")
    # From here on there is something on every page.
    window.wait(lambda: "Requests are refused" in window.text() and "worker-1" in window.text())
    window.open(f"{console}/models/search-rank")
    window.wait(lambda: "CPUExecutionProvider" in window.text())
    yield window
    window.close()


def keep(browser, name):
    if os.environ.get("RINGMESH_SCREENSHOTS"):
        IMAGES.mkdir(exist_ok=True)
        browser.screenshot(IMAGES / f"{name}.png")


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_every_page_can_be_read_by_everybody(browser, console, size):
    problems = {}
    browser.complaints()
    for page in PAGES:
        browser.open(console + page)
        found = browser.run(UNNAMED)
        for dark in (False, True):
            browser.look(*size, dark=dark)
            found += browser.run(FAINT)
        found += [line for line in browser.complaints() if "404" not in line]
        if (width := browser.run("return document.documentElement.scrollWidth")) > size[0]:
            found.append(f"{width} pixels wide")
        if found:
            problems[page] = found
    assert problems == {}


@pytest.mark.parametrize("width", [375, 1000, 1280, 1920])
def test_charts_fill_their_rows(browser, console, width):
    for page in ("/", "/cache", "/objectives", "/models/search-rank", "/workers/worker-0"):
        browser.look(width, 900)
        browser.open(console + page)
        assert browser.run("return document.querySelectorAll('.charts > .chart').length") > 1
        assert browser.run(GAPS) == [], page


def test_wide_tables_scroll_sideways_on_a_phone(browser, console):
    browser.look(*PHONE)
    for page in ("/", "/models", "/cache"):
        browser.open(console + page)
        wide = "return [...document.querySelectorAll('.scroll')].some(e => e.scrollWidth > e.clientWidth + 50)"
        assert browser.run(wide), page


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_the_table_of_models_shows_the_whole_reason_of_one_that_is_not_served(browser, console, size):
    browser.look(*size)
    browser.open(f"{console}/models?text=churn-forecast")
    reason = browser.run("""
        const e = document.querySelector('td.reason small'), box = e.getBoundingClientRect();
        return [e.innerText, e.scrollHeight <= box.height + 1 && box.width <= innerWidth];
    """)
    assert "churn-forecast/1/model.onnx: it is no ONNX model" in reason[0]
    assert reason[1]


def test_a_chart_shows_its_values_at_the_pointer_and_by_keys(browser, console):
    browser.look(*DESK)
    browser.open(f"{console}/?by=model")
    point = """
    const plot = document.querySelectorAll('.plot')[0], box = plot.getBoundingClientRect();
    plot.dispatchEvent(new PointerEvent('pointermove', {bubbles: true, clientX: box.left + box.width * arguments[0]}));
    """
    browser.run(point, 1.0)
    last = browser.text(".tip")
    assert all(f"\n{model}: " in last for model in RANKED)
    browser.run(point, 0.2)
    assert browser.text(".tip").split("\n")[0] != last.split("\n")[0]
    browser.run("document.querySelector('h1').dispatchEvent(new PointerEvent('pointermove', {bubbles: true}))")
    assert browser.text(".tip") == ""
    browser.run("document.querySelector('.plot').focus()")
    at = browser.text(".tip")
    browser.press(LEFT)
    assert browser.text(".tip").split("\n")[0] != at.split("\n")[0]


def test_the_time_range_and_the_breakdown_of_charts_are_chosen_by_links(browser, console):
    browser.look(*DESK)
    browser.open(f"{console}/")
    browser.run("[...document.querySelectorAll('.switch a')].find(e => e.textContent === '24 h').click()")
    browser.wait(lambda: "range=24+h" in browser.url)
    assert "24.0 h ago" in browser.text(".charts")
    browser.run("[...document.querySelectorAll('.switch a')].find(e => e.textContent === 'by worker').click()")
    browser.wait(lambda: "by=worker" in browser.url)
    assert "range=24+h" in browser.url
    assert "worker-2" in browser.text(".charts")


def test_a_purge_is_confirmed_and_counters_fall_after_it(browser, console):
    browser.look(*DESK)
    browser.open(f"{console}/cache")
    entries = """
    const row = [...document.querySelectorAll('tr')].find(e => /^router\tlocal/.test(e.innerText));
    return Number(row.cells[8].textContent);
    """
    browser.wait(lambda: browser.run(entries) > 100)
    browser.choose("select[name=scope]", "everything")
    browser.click("form[action='/cache'] .danger")
    browser.wait(lambda: "Purge everything?" in browser.text(".question"))
    before = browser.run(entries)
    browser.click(".question .danger")
    browser.wait(lambda: "Everything was purged" in browser.text(".notice"))
    browser.wait(lambda: browser.run(entries) < before)


def test_a_model_is_unloaded_after_a_question_that_can_be_declined(browser, console):
    browser.look(*DESK)
    browser.open(f"{console}/models/pipeline")
    browser.click("[value=unload]")
    browser.wait(lambda: "Unload pipeline on all workers?" in browser.text(".question"))
    browser.click(".question .quiet")
    browser.wait(lambda: not browser.text(".question"))
    assert "ready" in browser.text("#live .lead")
    assert "doubled" in browser.run("return document.querySelector('.graph').textContent")


def test_the_first_page_is_live_and_can_be_paused(browser, console):
    browser.look(*DESK)
    browser.open(f"{console}/")
    updates = "return Number(document.getElementById('live').dataset.updates || 0)"
    browser.wait(lambda: browser.run(updates) >= 2 and browser.text("#liveness-state") == "Live")
    browser.run("document.querySelector('#live th a').focus()")  # workers stay, findings come and go
    before = browser.run(updates)
    browser.wait(lambda: browser.run(updates) > before)
    assert browser.run("return document.activeElement.textContent").startswith("worker-")  # an update takes no focus
    browser.click("#pause")
    assert browser.text("#liveness-state") == "Paused"
    before = browser.run(updates)
    browser.run("return new Promise(done => setTimeout(done, 2500))")
    assert browser.run(updates) == before
    browser.click("#pause")
    browser.wait(lambda: browser.run(updates) > before)


def test_keys_reach_everything_and_the_focus_is_seen(browser, console):
    browser.look(*DESK)
    browser.open(f"{console}/models")
    browser.press(TAB)
    assert browser.run("return document.activeElement.textContent") == "Skip to content"
    assert browser.run("return document.activeElement.getBoundingClientRect().left") >= 0
    browser.press(ENTER)
    assert browser.run("return document.activeElement.id") == "main"
    for _ in range(5):  # name, order, show, clear
        browser.press(TAB)
    assert browser.run("return document.activeElement.className") == "scroll"
    assert browser.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.press(TAB)
    browser.press(ENTER)
    browser.wait(lambda: "/models/" in browser.url)


def test_a_request_is_sent_and_followed_to_its_trace(browser, console):
    browser.look(*DESK)
    browser.open(f"{console}/try?model=search-rank")
    browser.type("input[name=tenant]", "search")
    browser.click("#send")
    browser.wait(lambda: "See its trace" in browser.text())
    assert "miss" in browser.text("#result")
    keep(browser, "try")
    trace = browser.run("return document.querySelector('#result a').href")
    browser.open(trace)
    browser.wait(lambda: browser.open(trace) or "onnxruntime run" in browser.text())
    story = browser.text(".story")
    assert "A request for search-rank 1 of tenant search" in story
    assert "the owner of its key" in story
    assert browser.text(".waterfall").count("\n") >= 6
    keep(browser, "trace")


def test_a_trace_is_compared_with_another_by_two_clicks(browser, console):
    browser.look(*DESK)
    browser.open(f"{console}/traces?cache=miss&model=search-rank")
    browser.wait(lambda: browser.run("return document.querySelectorAll('table.traces a').length") > 1)
    assert browser.run("return document.querySelectorAll('.histogram a').length") > 0
    browser.click("table.traces a")
    browser.wait(lambda: "What happened" in browser.text())
    browser.run("[...document.querySelectorAll('a')].find(e => e.textContent.startsWith('Compare')).click()")
    browser.wait(lambda: "Choose the trace to compare" in browser.text())
    browser.click("table.traces a")
    browser.wait(lambda: "Two traces compared" in browser.text())
    assert browser.text(".waterfall").count("\n") >= 6
    for dark in (False, True):
        browser.look(*PHONE, dark=dark)
        assert browser.run(UNNAMED) + browser.run(FAINT) == []
        assert browser.run("return document.documentElement.scrollWidth") <= PHONE[0]


def test_models_are_found_by_name_and_put_in_order(browser, console):
    browser.look(*DESK)
    browser.open(f"{console}/models?order=busiest")
    names = "return [...document.querySelectorAll('#live th.name a')].map(e => e.textContent)"
    assert browser.run(names)[0] == RANKED[0]
    browser.type("input[name=text]", "RANK")
    browser.click("form.search button")
    browser.wait(lambda: "text=RANK" in browser.url)
    assert sorted(browser.run(names)) == ["feed-rank", "search-rank", "video-rank"]
    browser.wait(lambda: browser.text("#liveness-state") == "Live" and "3 of " in browser.text("#live"))
    browser.open(f"{console}/models?text=nothing+like+it")
    assert "has “nothing like it” in its name" in browser.text()


def test_a_request_that_joined_another_leads_to_it(browser, console, router):
    request = v2.ModelInferRequest(model_name="summaries")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 1])
    request.raw_input_contents.append(np.random.default_rng().random((1, 1), np.float32).tobytes())
    ids = [new_span_id() * 2 for _ in range(3)]
    with grpc.insecure_channel(router) as channel:
        stub = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        sent = [
            stub.future(
                request.SerializeToString(), metadata=[("traceparent", f"00-{one}-{new_span_id()}-01")], timeout=30
            )
            for one in ids
        ]
        outcomes = [dict(call.trailing_metadata())["ringmesh-cache"] for call in sent]
    joined, leader = ids[outcomes.index("joined")], ids[outcomes.index("miss")]
    browser.wait(lambda: browser.open(f"{console}/traces/{joined}") or leader[:12] in browser.text(".linked a"))
    browser.click(".linked a")
    browser.wait(lambda: browser.url.endswith(leader))
    # Spans of the worker come when they have been exported, and a page of a trace does not follow them.
    browser.wait(lambda: browser.open(f"{console}/traces/{leader}") or "onnxruntime run" in browser.text(".waterfall"))


def test_a_search_narrows_and_can_be_cleared(browser, console):
    browser.look(*DESK, dark=True)
    browser.open(f"{console}/traces")
    browser.choose("select[name=status]", "error")
    browser.click("form.search button")
    browser.wait(lambda: "status=error" in browser.url)
    assert "INVALID_ARGUMENT" in browser.text("table.traces")
    assert "ok" not in browser.run(
        "return [...document.querySelectorAll('table.traces .status')].map(e => e.textContent)"
    )
    keep(browser, "traces")
    browser.click("form.search a")
    browser.wait(lambda: browser.url.endswith("/traces"))


def test_the_way_back_leads_through_filters_and_pages(browser, console):
    browser.look(*DESK)
    browser.open(f"{console}/traces")
    browser.choose("select[name=status]", "error")
    browser.click("form.search button")
    browser.wait(lambda: "status=error" in browser.url)
    browser.click("table.traces a")
    browser.wait(lambda: "What happened" in browser.text())
    browser.run("history.back()")
    browser.wait(lambda: "status=error" in browser.url and browser.text("#liveness-state") == "Live")
    assert browser.run("return document.querySelector('select[name=status]').value") == "error"
    updates = "return Number(document.getElementById('live').dataset.updates || 0)"
    before = browser.run(updates)
    browser.wait(lambda: browser.run(updates) > before)
    browser.run("history.back()")
    browser.wait(lambda: browser.url.endswith("/traces"))
    assert browser.run("return document.querySelector('select[name=status]').value") == ""


def test_every_page_says_when_its_router_stops_answering_and_when_it_is_back(browser, console, stack):
    browser.look(*DESK)
    router = json.loads((Path(stack.state) / "stack.json").read_text())["processes"]["router"]
    browser.open(f"{console}/models")
    os.kill(router, signal.SIGSTOP)
    try:
        browser.wait(lambda: "does not answer" in browser.text("#live .notice"))
        for page in ("/cache", "/traces", "/objectives", "/cost"):
            browser.open(console + page)
            assert "shows its last answer" in browser.text("#live .notice")
        browser.open(f"{console}/")
        browser.wait(lambda: "Router is down" in browser.text(".findings"))
    finally:
        os.kill(router, signal.SIGCONT)
    browser.wait(lambda: "Router is down" not in browser.text("#live"))


def test_more_pages_than_a_browser_has_connections_are_all_live(browser, console):
    first = browser.tab()
    tabs = [browser.new_tab() for _ in range(8)]
    for tab in tabs:
        browser.show(tab)
        browser.open(f"{console}/models")
        browser.wait(lambda: browser.text("#liveness-state") == "Live")
    for tab in tabs:
        browser.show(tab)
        browser.close_tab()
    browser.show(first)


def test_pictures_for_the_documents(browser, console):
    browser.look(*DESK, dark=True)
    browser.open(f"{console}/cache")
    assert "payments" in browser.text("#live")
    keep(browser, "cache")
    browser.look(DESK[0], 1290)
    browser.open(f"{console}/")
    browser.wait(lambda: browser.text("#liveness-state") == "Live")
    keep(browser, "fleet")
    browser.look(*PHONE)
    browser.open(f"{console}/")
    assert "Needs attention" in browser.text()
    keep(browser, "phone")
