"""Metadata of calls."""

import hashlib
import tempfile
from pathlib import Path

from opentelemetry.trace import get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from cache.policy.cache_control import parse_cache_control
from services.runtime import w3c
from services.runtime.errors import RingmeshError
from services.runtime.oip.protocol import caller_metadata, identify, state_and_baggage
from services.runtime.rpc.access import Access
from services.runtime.rpc.api_keys import ApiKeys
from services.runtime.rpc.rpc import check_metadata
from tests.fuzz.target import joined, parts, target

TRACEPARENT = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
FOLDER = tempfile.TemporaryDirectory(prefix="ringmesh-fuzz-keys-")
FILE = Path(FOLDER.name, "keys.jsonl")
FILE.write_text(f'{{"id":"a","sha256":"{hashlib.sha256(b"rmk_a").hexdigest()}","tenant":"acme","roles":["infer"]}}\n')
ACCESS = Access("0.0.0.0:1", credential="secret", keys=ApiKeys(FILE))


@target("traceparent", [TRACEPARENT, b"01" + TRACEPARENT[2:] + b"-more", b"00-" + b"0" * 32 + TRACEPARENT[35:]])
def traceparent(data):
    """As OpenTelemetry reads it, which also takes blanks around it."""
    text = data.decode("latin-1")
    ours = w3c.parse_traceparent(text)
    context = get_current_span(TraceContextTextMapPropagator().extract({"traceparent": text})).get_span_context()
    theirs = (f"{context.trace_id:032x}", f"{context.span_id:016x}", context.trace_flags.sampled)
    if len(text) > 512:  # which OpenTelemetry refuses
        return
    if ours is not None:
        assert ours == theirs
        assert len(w3c.packed(w3c.traceparent(*ours))) == 24
    elif context.is_valid:
        assert text != text.strip(" \t\n")
    w3c.packed(text)


@target("baggage", [b"userId=alice,serverNode=DF%2028;p=1,isProduction=false", b"a=%ff%zz,=,;,b"])
def baggage(data):
    text = data.decode("latin-1")
    members = w3c.parse_baggage(text)
    assert len(members) <= 64
    assert all(key and key.isascii() and not set(key) & set(' ",;=\\') for key in members)
    assert len(w3c.usable_state(text)) <= 512


@target("cache-control", [b'no-cache, max-age="60", only-if-cached', b"max-age=" + b"9" * 200], RingmeshError)
def cache_control(data):
    """The same directives in any order and case mean the same."""
    text = data.decode("latin-1")
    found = parse_cache_control(text)
    assert found.max_age_ms is None or 0 <= found.max_age_ms <= 2**31 * 1000
    if text.isascii() and '"' not in text:
        assert parse_cache_control(",".join(reversed(text.upper().split(",")))) == found


@target(
    "metadata",
    [
        joined(b"ringmesh-tenant", b"acme", b"authorization", b"Bearer rmk_a", b"traceparent", TRACEPARENT),
        joined(b"ringmesh-credential", b"secret", b"ringmesh-tenant", b"other", b"ringmesh-priority", b"sheddable"),
        joined(b"cache-control", b"no-cache", b"cache-control", b"max-age=1", b"x-bin", b"\0\xff"),
    ],
    RingmeshError,
)
def metadata(data):
    """Whoever has neither key nor credential is nobody, and no key's tenant is another than its own."""
    found = [part.decode("latin-1") for part in parts(data)]
    sent = tuple(zip(found[::2], found[1::2], strict=False))
    check_metadata(sent)
    state_and_baggage(sent)
    values = caller_metadata(sent)
    identify(values, ACCESS)
    if values.error is None:
        if values.identity is None:
            assert values.credential == "secret"
        else:
            assert values.authorization.lower().startswith("bearer ")
            assert values.tenant == "acme"
