import re

import pytest

from services.cli.errors import CommandError
from services.cli.stack.probes import redis_answers
from services.runtime.redis.redis_url import Topology, parse_redis_url
from services.runtime.rpc.server import StartError


@pytest.mark.parametrize(
    ("url", "topology", "hosts", "service"),
    [
        ("redis://one", Topology.NODE, (("one", 6379),), ""),
        ("redis://:secret@one:7000/2", Topology.NODE, (("one", 7000),), ""),
        ("rediss://[::1]:7000", Topology.NODE, (("::1", 7000),), ""),
        ("redis+sentinel://a,b:7/predictions/1", Topology.SENTINEL, (("a", 26379), ("b", 7)), "predictions"),
        ("rediss+cluster://u:p@a:1,b", Topology.CLUSTER, (("a", 1), ("b", 6379)), ""),
        ("unix:///run/redis.sock?db=3", Topology.NODE, (), ""),
    ],
)
def test_a_url_names_topology_hosts_and_service(url, topology, hosts, service):
    found = parse_redis_url(url, "RINGMESH_REDIS_URL")
    assert (found.topology, found.hosts, found.service) == (topology, hosts, service)


def test_credentials_database_and_tls_become_options_of_the_connection():
    options = parse_redis_url("rediss+sentinel://u%40x:p%25@a/s/4?sentinel_password=q&ssl_cert_reqs=none", "X").options
    assert (options["username"], options["password"], options["db"]) == ("u@x", "p%", 4)
    assert options["ssl_cert_reqs"] == "none"
    assert "sentinel_password" not in options


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://one", "begins with 'http://'"),
        ("one:6379", "it has no scheme; there are redis://, .* as in redis://host:6379"),
        ("unix+sentinel:///socket", "begins with"),
        ("redis+ring://one", "begins with"),
        ("redis://a,b", "several hosts"),
        ("redis+sentinel://a", "lacks the service"),
        ("redis+cluster://a/1", "no databases"),
        ("redis://a/one", "number of a database"),
        ("redis://a:port", "ort"),
        ("redis://a:99999", "ort"),
        ("redis://a?colour=red", "no option 'colour'"),
        ("redis://a?sentinel_password=x", "for redis\\+sentinel"),
        ("rediss://a?ssl_ca_certs=/nowhere.pem", "no file '/nowhere.pem'"),
        ("redis://a?db=x", "db"),
    ],
)
def test_what_is_no_redis_url_is_refused_with_what_is_wrong(url, says):
    with pytest.raises(StartError, match=says):
        parse_redis_url(url, "RINGMESH_REDIS_URL")


@pytest.mark.parametrize(
    "url",
    [
        "redis+ring://user:hidden@one",
        *("redis://user:hid/hidden@one", "redis://user:hid?hidden@one", "redis://user:hid#hidden@one"),
        *("redis://user:hid/hidden@one:1/2", "user:hidden@one", "redis://one?sentinel_password=hidden"),
        "redis+sentinel://one?sentinel_password=hid@hidden",
    ],
)
def test_a_refusal_does_not_show_the_password(url):
    with pytest.raises(StartError, match="Redis URL") as caught:
        parse_redis_url(url, "X")
    assert "hid" not in str(caught.value)


@pytest.mark.parametrize("url", ["nonsense", "http://one", "one:6379"])
async def test_every_scheme_that_is_accepted_is_listed_to_who_gives_another(url):
    with pytest.raises(CommandError) as caught:
        await redis_answers(url)
    listed = set(re.findall(r"[a-z+]+(?=://)", str(caught.value).partition("as in")[0])) - {"http"}
    assert listed == {
        "unix",
        *(f"{scheme}{kind}" for scheme in ("redis", "rediss") for kind in ("", "+sentinel", "+cluster")),
    }
    for scheme in listed:
        assert parse_redis_url(f"{scheme}://a{'/s' if 'sentinel' in scheme else ''}", "X")
