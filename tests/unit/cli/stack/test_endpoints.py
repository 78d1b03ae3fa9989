"""The ports and hosts of a stack."""

import socket

import pytest

from services.cli.errors import CommandError
from services.cli.stack.endpoints import LOOPBACK, Endpoints


def every(endpoints):
    addresses = (
        endpoints.router,
        endpoints.cache,
        endpoints.valkey,
        endpoints.spans,
        endpoints.pages,
        endpoints.ledger,
    )
    return [*addresses, *endpoints.workers, *endpoints.metrics.values()]


def ports(endpoints):
    return [int(address.rpartition(":")[2]) for address in every(endpoints)]


def test_a_stack_has_one_block_of_100_ports():
    found = ports(Endpoints.create(LOOPBACK, 8001, workers=30, routers=8))
    assert len(found) == len(set(found))
    assert min(found) == 8001
    assert max(found) < 8101


def test_the_usual_ports_stay():
    endpoints = Endpoints.create(LOOPBACK, 8001, workers=2)
    assert endpoints.router == "127.0.0.1:8001"
    assert endpoints.pages == "127.0.0.1:8080"
    assert endpoints.cache == "127.0.0.1:8010"
    assert endpoints.metrics["router"] == "127.0.0.1:8002"


def test_more_workers_than_a_block_has_room_for_need_free_ports():
    with pytest.raises(CommandError, match="room for 30 workers; use free ports: --base-port 0"):
        Endpoints.create(LOOPBACK, 8001, workers=31)
    found = ports(Endpoints.create(LOOPBACK, 0, workers=31))
    assert len(found) == len(set(found)) == 6 + 31 + 31 + 4


def test_a_block_ends_at_the_last_port():
    Endpoints.create(LOOPBACK, 65436, workers=1)
    with pytest.raises(CommandError, match="lower --base-port"):
        Endpoints.create(LOOPBACK, 65437, workers=1)


def test_all_interfaces_are_reached_by_the_loopback_address_and_trusting_processes_stay_on_it():
    endpoints = Endpoints.create("0.0.0.0", 8001, workers=1)
    assert all(address.startswith("127.0.0.1:") for address in every(endpoints))
    assert endpoints.listen(endpoints.router) == "0.0.0.0:8001"
    assert endpoints.listen(endpoints.pages) == "0.0.0.0:8080"
    assert endpoints.listen(endpoints.metrics["worker-0"]).startswith("0.0.0.0:")
    internal = (endpoints.cache, endpoints.valkey, endpoints.spans, *endpoints.workers)
    assert [endpoints.listen(address) for address in internal] == [*internal]


def test_an_ipv6_address_is_bracketed():
    endpoints = Endpoints.create("::1", 8001, workers=1)
    assert endpoints.router == "[::1]:8001"
    assert endpoints.listen(endpoints.router) == "[::1]:8001"


def test_a_port_in_use_is_named():
    with socket.create_server((LOOPBACK, 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(CommandError, match=f"port {port} is in use by .*; choose another with --base-port"):
            Endpoints.create(LOOPBACK, port - 9, workers=1).check_free(valkey=False)  # the cache's


def test_a_foreign_address_is_named():
    with pytest.raises(CommandError, match=r"cannot listen on 192\.0\.2\.1: .*--host"):
        Endpoints.create("192.0.2.1", 0, workers=1).check_free(valkey=False)
