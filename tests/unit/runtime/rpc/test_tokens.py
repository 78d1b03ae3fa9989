"""Tokens of callers: what is verified, which attacks are refused, and how keys are rotated."""

import asyncio
import base64
import contextlib
import http.server
import json
import ssl
import threading
import time

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from services.runtime.errors import PermissionDeniedError, UnauthenticatedError, UnavailableError
from services.runtime.oip.protocol import caller_metadata, identify
from services.runtime.rpc import tokens
from services.runtime.rpc.access import Access
from services.runtime.rpc.api_keys import ApiKeys, Role, new_key
from services.runtime.rpc.tokens import KeySetError, Tokens
from tests.certificates import Ca, replace

ISSUER, AUDIENCE = "https://issuer.example.org", "ringmesh"
RSA = rsa.generate_private_key(65537, 2048)
EC, OTHER = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()
KEYS = {"rsa": (RSA, "RS256"), "ec": (EC, "ES256"), "ed": (ED, "EdDSA"), "other": (OTHER, "ES256")}


def jwks(*kids):
    made = []
    for kid in kids:
        key, algorithm = KEYS[kid]
        jwk = jwt.get_algorithm_by_name(algorithm).to_jwk(key.public_key(), as_dict=True)
        made.append({**jwk, "kid": kid, "alg": algorithm, "use": "sig"})
    return json.dumps({"keys": made}).encode()


PUBLIC = jwt.PyJWKSet.from_dict(json.loads(jwks("ec"))).keys[0]


def token(kid="ec", headers=None, drop=(), **claims):
    key, algorithm = KEYS[kid]
    said = {"sub": "app", "iss": ISSUER, "aud": AUDIENCE, "exp": time.time() + 600, "roles": ["infer"], **claims}
    said = {name: value for name, value in said.items() if name not in drop}
    return jwt.encode(said, key, algorithm, {"kid": kid, **(headers or {})})


def bearer(value):
    return (("authorization", f"Bearer {value}"),)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "jwks.json"
    path.write_bytes(jwks("rsa", "ec", "ed"))
    return path


@pytest.fixture
def verified(file):
    return Tokens(str(file), ISSUER, AUDIENCE, 30)


def caller(verified, metadata, keys=None):
    """What the path of an inference learns of its caller."""
    said = caller_metadata(metadata)
    identify(said, Access("0.0.0.0:1", (), keys=keys, tokens=verified))
    return said


@pytest.mark.parametrize("kid", ["rsa", "ec", "ed"])
def test_claims_say_who_calls_and_what_they_may_do(verified, kid):
    said = caller(verified, bearer(token(kid, tenant="acme", roles="infer read offline_access", models=["mlp"])))
    assert said.error is None
    assert said.tenant == "acme"
    assert said.identity.roles == {Role.INFER, Role.READ}
    assert said.identity.models == {"mlp"}
    assert str(said.identity) == "token app"
    denied = caller(verified, (*bearer(token(kid, tenant="acme")), ("ringmesh-tenant", "other"))).error
    assert isinstance(denied, PermissionDeniedError)


def test_a_token_without_the_role_may_not_infer(verified):
    for roles in ([], ["read"], "reader", None):
        assert isinstance(
            caller(verified, bearer(token(roles=roles))).error, PermissionDeniedError | UnauthenticatedError
        )


def test_claims_may_have_a_prefix(file):
    verified = Tokens(str(file), ISSUER, AUDIENCE, 30, "https://ringmesh/")
    claims = {"https://ringmesh/tenant": "acme", "https://ringmesh/roles": ["infer"]}
    assert caller(verified, bearer(token(tenant="other", **claims))).tenant == "acme"


def part(value):
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def with_header(**changes):
    """A valid token under another header."""
    _, payload, signature = token().split(".")
    return f"{part({'alg': 'ES256', 'kid': 'ec', **changes})}.{payload}.{signature}"


def hs256_with_the_public_key():
    import hashlib
    import hmac

    pem = RSA.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    payload = token("rsa").split(".")[1]
    signed = f"{part({'alg': 'HS256', 'typ': 'JWT', 'kid': 'rsa'})}.{payload}"
    digest = hmac.new(pem, signed.encode(), hashlib.sha256).digest()
    return f"{signed}.{base64.urlsafe_b64encode(digest).rstrip(b'=').decode()}"


ATTACKS = {
    "none": lambda: f"{part({'alg': 'none', 'kid': 'ec'})}.{token().split('.')[1]}.",
    "None, with a signature": lambda: with_header(alg="None"),
    "HS256 with the public key": hs256_with_the_public_key,
    "another algorithm of the same family": lambda: with_header(alg="ES384"),
    "an algorithm of another key": lambda: with_header(alg="RS256"),
    "expired": lambda: token(exp=time.time() - 31),
    "not yet valid": lambda: token(nbf=time.time() + 60),
    "issued in the future": lambda: token(iat=time.time() + 60),
    "without expiry": lambda: token(drop=["exp"]),
    "without subject": lambda: token(drop=["sub"]),
    "without issuer": lambda: token(drop=["iss"]),
    "without audience": lambda: token(drop=["aud"]),
    "of another issuer": lambda: token(iss="https://evil.example.org"),
    "for another audience": lambda: token(aud="other"),
    "for an audience that begins alike": lambda: token(aud=["ringmesh-test"]),
    "unknown crit": lambda: token(headers={"crit": ["exp"], "exp": 1}),
    "crit b64": lambda: token(headers={"crit": ["b64"], "b64": True}),
    "empty crit": lambda: with_header(crit=[]),
    "crit that is not a list": lambda: with_header(crit="exp"),
    "unknown kid": lambda: token("other"),
    "kid of another key": lambda: token("other", headers={"kid": "ec"}),
    "no kid": lambda: with_header(kid=None),
    "kid that is a path": lambda: with_header(kid="../../dev/null"),
    "kid that is a list": lambda: with_header(kid=["ec"]),
    "a key of its own": lambda: token("other", headers={"kid": "x", "jwk": json.loads(jwks("other"))["keys"][0]}),
    "a URL of keys of its own": lambda: token("other", headers={"kid": "x", "jku": "https://evil.example.org"}),
    "changed payload": lambda: ".".join([token().split(".")[0], part({"sub": "admin"}), token().split(".")[2]]),
    "no signature": lambda: token().rpartition(".")[0] + ".",
    "five parts": lambda: token() + ".x.y",
    "a tenant that operates": lambda: token(tenant="acme", roles=["operate"]),
    "a tenant that is a list": lambda: token(tenant=["acme"]),
    "a tenant with a line break": lambda: token(tenant="acme\nother"),
    "models that are a number": lambda: token(models=7),
    "deep claims": lambda: f"{part({'alg': 'ES256', 'kid': 'ec'})}.{part(0)[:0] + 'W' * 8000}.x",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_refused(verified, attack):
    sent = ATTACKS[attack]()
    # With API keys beside tokens too.
    assert isinstance(caller(verified, bearer(sent)).error, UnauthenticatedError), attack
    assert not verified._known


def test_clocks_may_differ_by_the_skew(verified):
    assert caller(verified, bearer(token(exp=time.time() - 20))).error is None
    assert caller(verified, bearer(token(nbf=time.time() + 20))).error is None


def test_a_verified_token_is_remembered_until_it_expires(verified, monkeypatch):
    sent = bearer(token())
    assert caller(verified, sent).error is None
    monkeypatch.setattr(jwt, "decode", None)
    assert caller(verified, sent).error is None
    later = time.time() + 600 + 31
    monkeypatch.setattr(tokens.time, "time", lambda: later)
    assert "expired" in caller(verified, sent).error.message


def test_remembered_tokens_are_bounded(verified, monkeypatch):
    monkeypatch.setattr(tokens, "_MOST_TOKENS", 3)
    for number in range(10):
        assert caller(verified, bearer(token(sub=f"app-{number}"))).error is None
        assert len(verified._known) <= 3


def test_keys_and_tokens_serve_beside_each_other(verified, tmp_path):
    key, entry = new_key("k", "acme", [Role.INFER], [], None)
    (tmp_path / "keys.jsonl").write_text(entry.model_dump_json(exclude_defaults=True))
    keys = ApiKeys(tmp_path / "keys.jsonl")
    assert caller(verified, bearer(key), keys).tenant == "acme"
    assert caller(verified, bearer(token(tenant="other")), keys).tenant == "other"
    for attack, sent in ATTACKS.items():
        assert isinstance(caller(verified, bearer(sent()), keys).error, UnauthenticatedError), attack
    assert isinstance(caller(verified, (), keys).error, UnauthenticatedError)


@given(st.one_of(st.binary(max_size=300).map(lambda raw: raw.decode("latin-1")), st.text(".eyJhbGciOi", max_size=80)))
def test_arbitrary_bytes_are_no_token(sent):
    verified = Tokens.__new__(Tokens)
    verified.__dict__.update(_known={}, _keys={"ec": None}, _is_missing_key=False)
    with pytest.raises(UnauthenticatedError):
        verified.identity(f"Bearer {sent}")


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=9), st.lists, max_leaves=6), st.data())
def test_arbitrary_signed_claims_are_refused_or_are_an_identity(value, data):
    name = data.draw(st.sampled_from(["sub", "exp", "nbf", "iat", "iss", "aud", "tenant", "roles", "models", "jti"]))
    verified = Tokens.__new__(Tokens)
    said = {"_known": {}, "_keys": {"ec": PUBLIC}, "_is_missing_key": False, "_prefix": "", "_skew": 30.0}
    verified.__dict__.update(said, _issuer=ISSUER, _audience=AUDIENCE)
    # jwt.encode checks some claims itself.
    claims = {"sub": "a", "iss": ISSUER, "aud": AUDIENCE, "exp": time.time() + 600, name: value}
    sent = jwt.api_jws.encode(json.dumps(claims).encode(), EC, "ES256", {"kid": "ec"})
    with contextlib.suppress(UnauthenticatedError):
        identity = verified.identity(f"Bearer {sent}")
        assert isinstance(identity.tenant, str)
        assert identity.roles <= {*Role}


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


async def test_keys_are_rotated_in_and_out_and_a_broken_file_changes_nothing(verified, file, monkeypatch):
    monkeypatch.setattr(tokens, "_POLL_SECONDS", 0.001)
    old, new = bearer(token("ec")), bearer(token("other"))
    following = asyncio.create_task(verified.follow())
    assert caller(verified, old).error is None
    assert "is not known" in caller(verified, new).error.message
    replace(file, jwks("ec", "other"))
    await until(lambda: caller(verified, new).error is None)
    assert caller(verified, old).error is None
    for broken in (b"nonsense", b"[]", b'{"keys": []}', b'{"keys": [{"kty": "oct", "k": "AAAA", "kid": "ec"}]}'):
        before = verified._seen
        replace(file, broken)
        await until(lambda: verified._seen != before)  # noqa: B023 - called in this iteration
        assert caller(verified, old).error is None
    replace(file, jwks("other"))
    await until(lambda: caller(verified, old).error is not None)
    assert caller(verified, new).error is None
    following.cancel()


async def test_a_file_that_changes_while_it_is_read_first_is_read_again(file, monkeypatch):
    monkeypatch.setattr(tokens, "_POLL_SECONDS", 0.001)
    load = Tokens._load

    def changed(self):
        keys = load(self)
        replace(file, jwks("other"))
        return keys

    with monkeypatch.context() as patch:
        patch.setattr(Tokens, "_load", changed)
        verified = Tokens(str(file), ISSUER, AUDIENCE, 30)
    following = asyncio.create_task(verified.follow())
    await until(lambda: caller(verified, bearer(token("other"))).error is None)
    following.cancel()


class _Issuer(http.server.BaseHTTPRequestHandler):
    answer = b""
    status = 200

    def do_GET(self):
        self.send_response(self.status)
        self.send_header("Location", "http://127.0.0.1:1/")
        self.end_headers()
        self.wfile.write(self.answer)

    def log_message(self, *_):
        """Says nothing."""


@pytest.fixture
def issuer(tmp_path, monkeypatch):
    """The URL of a JWKS over https, and the handler class that says what it answers."""
    ca = Ca()
    certificate, key = ca.issue("127.0.0.1").write(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(replace(tmp_path / "root.pem", ca.pem)))
    handler = type("Issuer", (_Issuer,), {"answer": jwks("ec")})
    server = http.server.HTTPServer(("127.0.0.1", 0), handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.01,)).start()
    yield f"https://127.0.0.1:{server.server_port}/keys", handler
    server.shutdown()
    server.server_close()


async def test_keys_of_a_url_are_read_again_if_a_token_names_an_unknown_one(issuer, monkeypatch):
    monkeypatch.setattr(tokens, "_POLL_SECONDS", 0.001)
    monkeypatch.setattr(tokens, "_EARLIEST_SECONDS", 0.01)
    url, handler = issuer
    verified = Tokens(url, ISSUER, AUDIENCE, 30)
    assert isinstance(caller(verified, bearer(token())).error, UnavailableError)
    following = asyncio.create_task(verified.follow())
    await until(lambda: caller(verified, bearer(token())).error is None)
    # A redirect is not followed, and the keys stay.
    handler.status = 302
    assert caller(verified, bearer(token("other"))).error is not None
    await until(lambda: not verified._is_missing_key)
    assert caller(verified, bearer(token())).error is None
    handler.status, handler.answer = 200, jwks("other")
    await until(lambda: caller(verified, bearer(token("other"))).error is None)
    assert caller(verified, bearer(token())).error is not None
    following.cancel()


@pytest.mark.parametrize(
    "malformed",
    [
        {"kty": "oct", "kid": "x"},
        {"kty": "RSA", "alg": "none"},
        {"kty": "RSA", "kid": ["x"], "n": "AQ", "e": "AQAB"},
        {"kty": "EC", "crv": "P-256", "x": 7, "y": None},
        {"kty": ["EC"], "alg": {}},
        ["EC"],
        None,
    ],
    ids=str,
)
def test_a_malformed_key_is_left_out_and_those_beside_it_are_used(file, malformed):
    document = json.loads(jwks("ec"))
    document["keys"].insert(0, malformed)
    file.write_text(json.dumps(document))
    assert caller(Tokens(str(file), ISSUER, AUDIENCE, 30), bearer(token("ec"))).error is None
    file.write_text(json.dumps({"keys": [malformed]}))
    with pytest.raises(KeySetError, match="has no public key to verify signatures"):
        Tokens(str(file), ISSUER, AUDIENCE, 30)


@pytest.mark.filterwarnings("ignore:The RSA key is 1024 bits")  # when it signs
def test_a_token_of_a_key_that_is_too_short_is_refused(file, monkeypatch):
    monkeypatch.setitem(KEYS, "rsa", (rsa.generate_private_key(65537, 1024), "RS256"))
    file.write_bytes(jwks("rsa"))
    refused = caller(Tokens(str(file), ISSUER, AUDIENCE, 30), bearer(token("rsa"))).error
    assert isinstance(refused, UnauthenticatedError)
    assert "1024 bits long, which is below the minimum recommended size of 2048 bits" in refused.message


@pytest.mark.parametrize("document", ["[]", "7", "{}", '{"keys": {}}', "null"])
def test_a_document_without_a_list_of_keys_is_named(file, document):
    file.write_text(document)
    with pytest.raises(KeySetError, match="it has no list `keys`"):
        Tokens(str(file), ISSUER, AUDIENCE, 30)


def test_keys_must_be_readable_at_the_start(tmp_path):
    for source, says in (
        (str(tmp_path / "missing"), "cannot read a JWKS"),
        ("http://127.0.0.1/keys", "a path or an https URL"),
    ):
        with pytest.raises(KeySetError, match=says):
            Tokens(source, ISSUER, AUDIENCE, 30)
