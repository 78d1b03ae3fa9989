"""The console of a stack with API keys, in a real browser: sign-in, roles, revocation, sign-out, and the audit log."""

import json
from pathlib import Path

import pytest

from services.cli.commands import keys
from tests import models
from tests.system.browser import ENTER, Browser, is_here
from tests.system.conftest import start_stack, stop_stack
from tests.system.test_console_browser import DESK, FAINT, PHONE, UNNAMED

pytestmark = [
    pytest.mark.proof,
    pytest.mark.skipif(not is_here(), reason="needs Debian's chromium and chromium-driver"),
]


@pytest.fixture(scope="module")
def key_file(tmp_path_factory):
    return tmp_path_factory.mktemp("keys") / "keys.jsonl"


@pytest.fixture(scope="module")
def key(key_file):
    """The keys, by id."""
    made = {
        "ops-1": ("", ["read", "infer", "operate"]),
        "acme-1": ("acme", ["read", "infer"]),
        "root-1": ("", ["admin"]),
    }
    return {id: keys.create(key_file, id, tenant, roles, [], None) for id, (tenant, roles) in made.items()}


@pytest.fixture(scope="module")
def console(key, key_file, tmp_path_factory):
    """The URL of the pages."""
    repository = tmp_path_factory.mktemp("models")
    models.mlp(repository)
    state = tmp_path_factory.mktemp("signed")
    stack = start_stack(state, "--models", str(repository), "--workers", "1", "--drain", "2", api_keys=str(key_file))
    yield json.loads((Path(stack.state) / "stack.json").read_text())["console"]
    assert stop_stack(stack) == 0


@pytest.fixture
def browser(console, tmp_path):
    """One that has never been here."""
    window = Browser(tmp_path / "chromium")
    window.look(*DESK)
    yield window
    # Neither its policy nor a script of the page was violated.
    complaints = window.complaints()
    window.close()
    assert [line for line in complaints if not any(f"status of {code}" in line for code in (401, 403, 429))] == []


def sign_in(browser, key):
    browser.type("[name=key]", key + ENTER)
    browser.wait(lambda: "/sign-in" not in browser.url)


def test_a_page_is_shown_after_the_sign_in_and_not_after_the_sign_out(browser, console, key):
    browser.open(f"{console}/models/mlp?range=2+h")
    assert browser.url.startswith(f"{console}/sign-in?next=")
    assert browser.text("nav").strip() == ""
    browser.type("[name=key]", "rmk_wrong" + ENTER)
    browser.wait(lambda: "unknown or revoked" in browser.text(".notice"))
    sign_in(browser, key["ops-1"])
    assert browser.url == f"{console}/models/mlp?range=2+h"
    assert "key ops-1" in browser.text(".visitor")
    assert browser.run("return document.cookie") == ""
    browser.click(".visitor button")
    browser.wait(lambda: browser.url.startswith(f"{console}/sign-in"))
    browser.open(f"{console}/models/mlp")
    assert browser.url.startswith(f"{console}/sign-in")


def test_an_operator_purges_and_the_audit_log_says_who(browser, console, key):
    browser.open(f"{console}/cache")
    sign_in(browser, key["ops-1"])
    assert "Audit" not in browser.text("nav")
    browser.choose("select[name=scope]", "everything")
    browser.click("form[action='/cache'] .danger")
    browser.wait(lambda: "Purge everything?" in browser.text(".question"))
    browser.click(".question .danger")
    browser.wait(lambda: "Everything was purged" in browser.text(".notice"))
    browser.click(".visitor button")
    browser.wait(lambda: "/sign-in" in browser.url)
    browser.open(f"{console}/audit?method=Purge")
    sign_in(browser, key["root-1"])
    (row,) = [row for row in browser.text("tbody").splitlines() if "CacheService/Purge" in row]
    assert "key ops-1" in row
    browser.open(f"{console}/audit?who=ops-1&method=POST")
    assert "POST /cache" in browser.text("tbody")
    assert "POST /sign-in" in browser.text("tbody")


def test_a_key_of_a_tenant_sees_and_sends_as_that_tenant(browser, console, key):
    browser.open(f"{console}/")
    sign_in(browser, key["acme-1"])
    assert "key acme-1 is for tenant 'acme'" in browser.text()
    assert browser.text("nav").split() == ["Traces", "Try", "it"]
    browser.open(f"{console}/try?model=mlp")
    browser.click("#send")
    browser.wait(lambda: "FROM" in browser.text("#result").upper())
    assert "miss" in browser.text("#result")
    browser.open(f"{console}/traces")
    browser.wait(lambda: "acme" in browser.text("tbody"))


def test_a_revoked_key_leads_back_to_the_sign_in(browser, console, key, key_file):
    key["short-lived"] = keys.create(key_file, "short-lived", "", ["read"], [], None)

    def signs_in():
        """The console knows a new key within two seconds; until then the form says that it is unknown."""
        browser.open(f"{console}/")  # without what the form said before
        browser.type("[name=key]", key["short-lived"] + ENTER)
        browser.wait(lambda: browser.text(".visitor, .notice.bad"))
        return "/sign-in" not in browser.url

    browser.wait(signs_in)
    browser.wait(lambda: browser.text("#liveness-state") == "Live")
    left = [line for line in key_file.read_text().splitlines() if '"short-lived"' not in line]
    key_file.write_text("".join(f"{line}\n" for line in left))
    browser.wait(lambda: browser.url == f"{console}/sign-in?next=%2F")


def test_the_sign_in_and_the_audit_page_can_be_read_by_everybody(browser, console, key):
    problems = []
    for page in ("/sign-in", "/audit"):
        browser.look(*DESK)
        browser.open(console + page)
        if "/audit" in page:
            sign_in(browser, key["root-1"])
        problems += [line for line in browser.run(UNNAMED) if page != "/sign-in" or "nav" not in line]
        for size in (DESK, PHONE):
            for dark in (False, True):
                browser.look(*size, dark=dark)
                problems += browser.run(FAINT)
            if (width := browser.run("return document.documentElement.scrollWidth")) > size[0]:
                problems.append(f"{page} is {width} pixels wide")
    assert problems == []
