"""What says who calls: tokens, the keys that verify them, cookies and metadata of sign-ins."""

import base64
import json
import tempfile
from pathlib import Path

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from starlette.datastructures import Headers

from services.console.security import COOKIE, Guard
from services.console.sessions import Sessions
from services.runtime.errors import UnauthenticatedError
from services.runtime.rpc.access import Access
from services.runtime.rpc.roles import Role
from services.runtime.rpc.tokens import KeySetError, Tokens
from tests.fuzz.target import target
from tests.fuzz.targets.metadata import ACCESS

_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
_HELD = tempfile.TemporaryDirectory(prefix="ringmesh-fuzz-jwks-", dir=_MEMORY)
_FILE = Path(_HELD.name, "jwks.json")
_SIGNING = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32))
_KEYS = {
    "EdDSA": _SIGNING,
    "ES256": ec.derive_private_key(7, ec.SECP256R1()),
    "RS256": rsa.generate_private_key(65537, 2048),
}


def _jwk(algorithm, key=None, **more):
    made = jwt.get_algorithm_by_name(algorithm).to_jwk(key or _KEYS[algorithm].public_key(), as_dict=True)
    return {**made, "kid": algorithm, "use": "sig", **more}


def _jwks(*keys):
    return json.dumps({"keys": keys}).encode()


def _tokens(keys):
    _FILE.write_bytes(keys)
    return Tokens(str(_FILE), "issuer", "ringmesh", 30)


def _part(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def _signed(header, claims):
    sent = _part(header) + b"." + _part(claims)
    return (sent + b"." + _part(_SIGNING.sign(sent))).decode()


_TOKENS = _tokens(_jwks(_jwk("EdDSA"), _jwk("ES256")))
_HEADER = b'{"alg":"EdDSA","kid":"EdDSA"}'
_CLAIMS = b'{"sub":"a","iss":"issuer","aud":"ringmesh","exp":4e9,'


@target(
    "token",
    [
        _HEADER + b"\n" + _CLAIMS + b'"tenant":"acme","roles":["infer"],"models":["m"]}',
        _HEADER + b"\n" + _CLAIMS + b'"roles":"infer read","nbf":1,"iat":1,"jti":"x"}',
        _HEADER + b"\n" + _CLAIMS.replace(b'"ringmesh"', b'["x","ringmesh"]') + b'"tenant":"t","roles":["admin"]}',
        b'{"alg":"EdDSA","kid":"EdDSA","crit":["exp"]}\n' + _CLAIMS + b'"x":1}',
        b'{"alg":"EdDSA","kid":["EdDSA"]}\n' + _CLAIMS.replace(b"4e9", b"1e999") + b'"x":1}',
        b'{"alg":"none"}\n' + _CLAIMS + b'"x":1}\n',
        b'{"alg":"ES256","kid":"ES256"}\n{}\n' + b"A" * 86,
        _HEADER + b"\n" + b"[" * 3000,
    ],
    UnauthenticatedError,
)
def token(data):
    """Lines: header, claims, and a signature, without which the token is signed as it should be. What is signed may
    not be what roles forbid, and what is signed otherwise is refused."""
    lines = data.split(b"\n", 2)
    header, claims = [*lines, b""][:2]
    signed = _signed(header, claims)
    sent = signed if len(lines) < 3 else f"{signed.rpartition('.')[0]}.{lines[2].decode('latin-1')}"
    _TOKENS._known.clear()
    identity = _TOKENS.identity(f"Bearer {sent}")
    assert sent == signed
    assert json.loads(claims)["sub"] == identity.id
    assert json.loads(claims)["iss"] == "issuer"
    assert identity.tenant.isascii()
    assert identity.tenant.isprintable()
    assert identity.roles <= {*Role}
    assert not (identity.tenant and identity.roles & {Role.OPERATE, Role.ADMIN})


@target(
    "jwks",
    [
        _jwks(*map(_jwk, _KEYS)),
        _jwks(_jwk("EdDSA", _SIGNING)),
        _jwks({"kty": "oct", "k": "AAAA", "kid": "EdDSA"}, _jwk("EdDSA", use="enc"), _jwk("ES256", x="AAAA")),
        _jwks({"kty": "RSA", "n": "AQ", "e": "AQAB"}, {"kty": "EC", "crv": "P-1"}, {"kty": "OKP", "x": 7}, [], None),
        b'{"keys": 7}',
        b'{"keys":' * 3000,
    ],
    KeySetError,
)
def jwks(data):
    """Keys that are read verify signatures: a token that nobody signed is refused with each of them."""
    tokens = _tokens(data)
    for kid, key in tokens._keys.items():
        assert key.key_type != "oct"
        for algorithm in {key.algorithm_name, "EdDSA", "HS256"}:
            header, claims = json.dumps({"alg": algorithm, "kid": kid}).encode(), _CLAIMS + b'"x":1}'
            try:
                tokens.identity(f"Bearer {(_part(header) + b'.' + _part(claims)).decode()}.AAAA")
            except UnauthenticatedError:
                continue
            raise AssertionError(f"accepted by {kid!r}")


_ACCESS = Access("0.0.0.0:1", keys=ACCESS._keys, tokens=_TOKENS)
_SESSIONS = Sessions(_ACCESS.identity)
_SESSION = _SESSIONS.open("rmk_a", "127.0.0.1").encode()
_GUARD = Guard(None, (), _ACCESS, _SESSIONS, None)


@target(
    "session",
    [
        f"{COOKIE}=SESSION; theme=dark".encode(),
        f'x="\\073"; {COOKIE}="SESSION"; {COOKIE}=other;;=;'.encode(),
        b"Bearer rmk_a",
        b"Bearer a.b.c",
        b"bearer \xff..",
    ],
    UnauthenticatedError,
)
def session(data):
    """As a cookie, and as the metadata of a program. Whoever has neither the session nor the key is nobody."""
    cookie = data.replace(b"SESSION", _SESSION)
    for name, sent, secret in ((b"authorization", data, b"rmk_a"), (b"cookie", cookie, _SESSION)):
        try:
            visitor = _GUARD._visitor(Headers(raw=[(name, sent)]), "127.0.0.1")
        except UnauthenticatedError:
            continue
        assert secret in sent
        assert visitor.who == "key a"
        assert visitor.is_current()
