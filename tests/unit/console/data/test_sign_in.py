"""What the console shows and does for holders of API keys, and for everybody else."""

import asyncio
import json
import math
from urllib.parse import urlencode

import jwt
import pytest

from services.console import sessions as sessions_module
from services.console.sessions import ATTEMPTS, IDLE_SECONDS, MOST_OF_A_HOLDER, SECONDS, Sessions
from services.runtime.errors import ResourceExhaustedError, UnauthenticatedError
from services.runtime.rpc.access import Access
from services.runtime.rpc.api_keys import ApiKeys, new_key
from services.runtime.rpc.audit_log import AuditLog
from services.runtime.rpc.identity import Identity
from services.runtime.rpc.tokens import Tokens
from tests.unit.clock import Clock
from tests.unit.console.data.test_console_requests import GOOD, Console
from tests.unit.console.data.test_trace_store import span

HTML = (b"accept", b"text/html")
KEYS = {
    "reader": ("", ["read"], []),
    "ops": ("", ["read", "infer", "operate"], []),
    "admin": ("", ["admin"], []),
    "acme": ("acme", ["read", "infer"], []),
    "mlp": ("", ["read", "infer"], ["mlp"]),
    "caller": ("", ["infer"], []),
}


def write_keys(path, ids):
    made = {id: new_key(id, *KEYS[id], None) for id in ids}
    path.write_text("".join(entry.model_dump_json(exclude_defaults=True) + "\n" for _, entry in made.values()))
    return {id: key for id, (key, _) in made.items()}


class ClosedConsole(Console):
    """A console whose visitors sign in."""

    def request(self, method, path, cookie="", headers=(), **more):
        """(status, headers, text)"""
        got = {}
        sent = [HTML, *headers, *([(b"cookie", cookie.encode())] if cookie else [])]
        status, text = self.run(self.answer(method, path, headers=sent, got=got, **more))
        return status, got, text

    def sign_in(self, key, **more):
        return self.request("POST", "/sign-in", body=urlencode({"key": key}).encode(), **more)


class SignedConsole(ClosedConsole):
    """A console whose visitors need keys, which are in `keys` by id."""

    def __init__(self, folder):
        self.file, self.log = folder / "keys.jsonl", folder / "audit.jsonl"
        self.keys = write_keys(self.file, KEYS)
        super().__init__(Access("127.0.0.1:0", keys=ApiKeys(self.file), audit=AuditLog("console", self.log)))

    def cookie(self, id, **more):
        return self.sign_in(self.keys[id], **more)[1]["set-cookie"].partition(";")[0]

    def audited(self):
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture(scope="module")
def console(tmp_path_factory):
    console = SignedConsole(tmp_path_factory.mktemp("signed"))
    yield console
    console.close()


@pytest.fixture
def another(tmp_path):
    """One whose keys a test may change, and that has refused nothing yet."""
    console = SignedConsole(tmp_path)
    yield console
    console.close()


@pytest.mark.parametrize("path", ["/", "/models", "/cache", "/traces", "/api/summary", "/try", "/cost", "/nowhere"])
def test_nobody_sees_a_page_without_a_session(console, path):
    status, headers, text = console.request("GET", path, query=b"a=b")
    assert (status, headers["location"]) == (303, f"/sign-in?{urlencode({'next': f'{path}?a=b'})}")
    assert console.ask("GET", path)[0] == 401
    assert console.ask("POST", path)[0] == 401
    assert "mlp" not in text


def test_a_form_asks_for_the_key_and_a_right_one_leads_to_the_page_that_was_wanted(console):
    status, _, text = console.request("GET", "/sign-in", query=b"next=%2Fcache")
    assert status == 200
    assert 'type="password" name="key"' in text
    assert "/cache" not in text
    status, headers, _ = console.sign_in(console.keys["reader"], query=b"next=%2Fcache%3Frange%3D2%2Bh")
    assert (status, headers["location"]) == (303, "/cache?range=2+h")
    cookie, *attributes = headers["set-cookie"].split("; ")
    assert {"HttpOnly", "SameSite=strict", "Path=/", f"Max-Age={SECONDS:.0f}"} == set(attributes)
    status, _, text = console.request("GET", "/cache", cookie)
    assert status == 200
    assert "key reader" in text
    assert console.keys["reader"] not in text + cookie


@pytest.mark.parametrize("elsewhere", ["//evil.example", "https://evil.example", "/\\evil.example", "x", "/sign-in"])
def test_a_sign_in_leads_to_the_console_only(console, elsewhere):
    query = urlencode({"next": elsewhere}).encode()
    assert console.sign_in(console.keys["reader"], query=query, client="10.0.1.1")[1]["location"] == "/"


def test_the_cookie_is_for_tls_only_if_the_page_came_by_tls(console):
    assert "; Secure" in console.sign_in(console.keys["reader"], origin=b"https://127.0.0.1")[1]["set-cookie"]
    assert "; Secure" not in console.sign_in(console.keys["reader"])[1]["set-cookie"]


def test_a_sign_in_from_another_site_is_refused(console):
    status, headers, _ = console.sign_in(console.keys["reader"], origin=b"http://evil.example")
    assert status == 403
    assert "set-cookie" not in headers


def test_what_a_visitor_sees_and_does_follows_the_roles_of_the_key(console):
    purge = {"body": urlencode({"scope": "everything"}).encode()}
    load = {"body": urlencode({"action": "load", "confirmed": "yes"}).encode()}
    try_out = {"body": urlencode({"model": "mlp", **GOOD}).encode()}
    allowed = {}
    for id in KEYS:
        cookie = console.cookie(id, client=f"10.1.0.{len(id)}")
        allowed[id] = [
            console.request(method, path, cookie, **more)[0]
            for method, path, more in (
                ("GET", "/", {}), ("GET", "/models/mlp", {}), ("GET", "/traces", {}),
                ("POST", "/try", try_out), ("POST", "/cache", purge), ("POST", "/models/mlp", load),
                ("GET", "/audit", {}),
            )
        ]  # fmt: skip
    no = 403
    assert allowed == {
        "reader": [200, 200, 200, no, no, no, no],
        "ops": [200, 200, 200, 200, 200, 200, no],
        "admin": [200, 200, 200, 200, 200, 200, 200],
        "acme": [no, no, 200, 200, no, no, no],
        "mlp": [no, 200, 200, 200, no, no, no],
        "caller": [no, no, no, 200, no, no, no],
    }


def test_pages_offer_only_what_the_key_may_do(console):
    ops, reader, acme = (console.cookie(id, client="10.2.0.1") for id in ("ops", "reader", "acme"))
    for path, words in (("/cache", ">Purge</button>"), ("/models/mlp", 'value="load"')):
        assert words in console.request("GET", path, ops)[2]
        assert words not in console.request("GET", path, reader)[2]
    assert ">Send</button>" in console.request("GET", "/try", ops)[2]
    assert ">Send</button>" not in console.request("GET", "/try", reader)[2]
    page = console.request("GET", "/traces", acme)[2]
    assert 'href="/traces"' in page
    assert 'href="/cache"' not in page
    refused = console.request("GET", "/cache", acme)
    assert refused[0] == 403
    assert "key acme is for tenant &#39;acme&#39;" in refused[2]


def test_the_fleet_is_called_in_the_name_of_the_visitor(console):
    console.calls.clear()
    cookie = console.cookie("ops", client="10.3.0.1")
    console.request("POST", "/try", cookie, body=urlencode({"model": "mlp", **GOOD}).encode())
    load = urlencode({"action": "load", "confirmed": "yes"}).encode()
    console.request("POST", "/models/mlp", cookie, body=load)
    assert [method for method, _ in console.calls] == ["ModelInfer", "RepositoryModelLoad"]
    for _, metadata in console.calls:
        assert metadata["authorization"] == f"Bearer {console.keys['ops']}"
        assert "ringmesh-credential" not in metadata


def test_a_key_of_a_tenant_sees_traces_of_that_tenant_only(console):
    for trace, tenant in ((51, "acme"), (52, "other"), (53, "")):
        console.traces.add("ringmesh-router", span(trace, model="shared-model", tenant=tenant))
    acme, reader = (console.cookie(id, client="10.4.0.1") for id in ("acme", "reader"))
    page = console.request("GET", "/traces", acme)[2]
    assert f"{51:032x}" in page
    assert f"{52:032x}" not in page
    assert "other" not in page
    assert f"{52:032x}" in console.request("GET", "/traces", reader)[2]
    # The two see different pages at the same address, live too.
    live = [(b"accept", b"text/event-stream")]
    for cookie, sees in ((reader, True), (acme, False)):
        assert (f"{52:032x}" in first_event(console, "/traces", cookie, live)) is sees
    assert console.request("GET", f"/traces/{51:032x}", acme)[0] == 200
    assert console.request("GET", f"/traces/{52:032x}", acme)[0] == 404
    assert console.request("GET", "/compare", acme, query=f"a={51:032x}&b={52:032x}".encode())[0] == 404


def first_event(console, path, cookie, headers):
    """The first event of a live page."""

    async def follow():
        came = asyncio.get_running_loop().create_future()

        def sent(_, text):
            if text and not came.done():
                came.set_result(text.decode())

        answer = console.answer("GET", path, headers=[*headers, (b"cookie", cookie.encode())], sent=sent)
        task = asyncio.create_task(answer)
        try:
            return await asyncio.wait_for(came, 60)
        finally:
            task.cancel()

    return console.run(follow())


def test_a_sign_out_ends_the_session(console):
    cookie = console.cookie("reader", client="10.5.0.1")
    status, headers, _ = console.request("POST", "/sign-out", cookie)
    assert (status, headers["location"]) == (303, "/sign-in")
    assert "Max-Age=0" in headers["set-cookie"]
    assert console.request("GET", "/", cookie)[0] == 303


def test_a_program_may_send_its_key_as_callers_do(console):
    headers = [(b"authorization", f"Bearer {console.keys['reader']}".encode())]
    assert console.ask("GET", "/api/summary", headers=headers)[0] == 200
    assert console.ask("GET", "/api/summary", headers=[(b"authorization", b"Bearer rmk_wrong")])[0] == 401
    headers = [(b"authorization", f"Bearer {console.keys['caller']}".encode())]
    refusal = "this needs the role read, which key 'caller' does not have\n"
    assert console.ask("GET", "/api/summary", headers=headers) == (403, refusal)


def test_who_did_what_is_audited_without_the_key(another):
    console = another
    cookie = console.cookie("ops", client="10.6.0.1")
    console.sign_in("rmk_guessed", client="10.6.0.2")
    console.request("POST", "/cache", cookie, body=urlencode({"scope": "everything"}).encode(), client="10.6.0.1")
    console.request("POST", "/cache", console.cookie("reader"), client="10.6.0.3")
    console.ask("POST", "/cache", client="10.6.0.4")
    told = {(entry["who"], entry["method"], entry["peer"], entry["result"]) for entry in console.audited()}
    assert told >= {
        ("key ops", "POST /sign-in", "10.6.0.1", "303"),
        ("unknown", "POST /sign-in", "10.6.0.2", "401"),
        ("key ops", "POST /cache", "10.6.0.1", "200"),
        ("key reader", "POST /cache", "10.6.0.3", "403"),
        ("unknown", "POST /cache", "10.6.0.4", "401"),
    }
    secrets = [*console.keys.values(), "rmk_guessed", cookie.partition("=")[2]]
    assert not any(secret in console.log.read_text() for secret in secrets)


def test_the_audit_page_shows_who_did_what_and_is_searched(console):
    admin = console.cookie("admin", client="10.8.0.1")
    for who, method in (("key <b>", "x.Service/RepositoryModelLoad"), ("local", "x.Service/Purge")):
        console.access.audit.write(who, method, "ipv4:10.0.0.9:1", "OK", request={"model_name": "mlp"})
    page = console.request("GET", "/audit", admin)[2]
    assert "key &lt;b&gt;" in page
    assert "Service/RepositoryModelLoad <small>{&#34;model_name&#34;: &#34;mlp&#34;}</small>" in page
    assert "ipv4:10.0.0.9:1" in page
    # The router of these tests has no audit log.
    assert "UNIMPLEMENTED" in page
    found = console.request("GET", "/audit", admin, query=b"span=7d&who=local&method=Purge")[2]
    assert "Service/Purge" in found
    assert "Service/RepositoryModelLoad" not in found


def test_attempts_from_one_address_are_limited(console, monkeypatch):
    monkeypatch.setattr(sessions_module, "ATTEMPTS_A_SECOND", 1e-3)  # however slow this machine is
    statuses = [console.sign_in("rmk_guess", client="10.7.0.1")[0] for _ in range(ATTEMPTS + 1)]
    assert statuses == [401] * ATTEMPTS + [429]
    status, headers, text = console.sign_in(console.keys["reader"], client="10.7.0.1")
    assert status == 429
    assert int(headers["retry-after"]) > 0
    assert "Too many attempts to sign in from 10.7.0.1; retry in" in text
    assert console.sign_in(console.keys["reader"], client="10.7.0.2")[0] == 303


def test_a_revoked_key_ends_its_sessions_and_live_pages(another):
    console = another
    cookie = console.cookie("reader")
    assert console.request("GET", "/", cookie)[0] == 200
    live = [(b"accept", b"text/event-stream"), (b"cookie", cookie.encode())]

    async def end():
        page = asyncio.create_task(console.answer("GET", "/", headers=live))
        follow = asyncio.create_task(console.access.follow())
        write_keys(console.file, ["ops"])
        status, text = await asyncio.wait_for(page, 60)
        follow.cancel()
        return status, text

    status, text = console.run(end())
    assert status == 200
    assert "data: " in text
    assert console.request("GET", "/", cookie)[0] == 303


def test_a_page_and_a_sign_in_say_that_the_keys_of_tokens_have_not_been_read_yet():
    console = ClosedConsole(Access("127.0.0.1:0", tokens=Tokens("https://example.org/keys", "issuer", "ringmesh", 0)))
    token = jwt.encode({}, "of thirty-two bytes, as it should", "HS256", {"kid": "a"})
    answers = [
        console.request("GET", "/", headers=[(b"authorization", f"Bearer {token}".encode())]),
        console.sign_in(token),
    ]
    console.close()
    for status, _, text in answers:
        assert status == 503
        assert "The keys of tokens cannot be read from https://example.org/keys yet." in text


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def sessions(tmp_path, clock):
    made = write_keys(tmp_path / "keys.jsonl", ["reader", "ops"])
    sessions = Sessions(ApiKeys(tmp_path / "keys.jsonl").identity, clock)
    sessions.made = made
    return sessions


def test_a_session_ends_when_it_is_old_or_unused(sessions, clock):
    unused, used = (sessions.open(sessions.made["reader"], "a") for _ in range(2))
    clock.now += IDLE_SECONDS - 1
    assert sessions.find(used)[0].id == "reader"
    clock.now += 1
    assert not sessions.is_open(unused)
    assert sessions.is_open(used)
    while clock.now + IDLE_SECONDS / 2 < SECONDS:
        clock.now += IDLE_SECONDS / 2
        assert sessions.is_open(used)
    clock.now = SECONDS
    assert not sessions.is_open(used)


def test_a_key_has_a_bounded_number_of_sessions_and_takes_none_of_others(sessions, clock):
    other = sessions.open(sessions.made["ops"], "a")
    tokens = []
    for _ in range(MOST_OF_A_HOLDER + 3):
        clock.now += 10
        tokens.append(sessions.open(sessions.made["reader"], "a"))
    assert [sessions.is_open(token) for token in tokens] == [False] * 3 + [True] * MOST_OF_A_HOLDER
    assert sessions.is_open(other)
    assert len(set(tokens)) == len(tokens)


def test_sessions_of_a_token_take_none_of_a_key_with_the_same_id(clock):
    def identify(authorization):
        return Identity("ops", "", frozenset(), frozenset(), math.inf, authorization.removeprefix("Bearer "))

    sessions = Sessions(identify, clock)
    of_a_key = sessions.open("key", "a")
    for _ in range(MOST_OF_A_HOLDER + 1):
        clock.now += 10
        sessions.open("token", "a")
    assert sessions.is_open(of_a_key)


def test_attempts_are_counted_whether_right_or_wrong(sessions, clock):
    for _ in range(ATTEMPTS):
        with pytest.raises(UnauthenticatedError):
            sessions.open("rmk_wrong", "a")
    with pytest.raises(ResourceExhaustedError) as refused:
        sessions.open(sessions.made["reader"], "a")
    assert sessions.is_open(sessions.open(sessions.made["reader"], "b"))
    clock.now += refused.value.retry_after
    assert sessions.is_open(sessions.open(sessions.made["reader"], "a"))
