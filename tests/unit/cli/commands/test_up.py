"""What `ringmesh up` warns of."""

import pytest

from services.cli.commands import up


def about_keys(address):
    return [warning for warning in up.warnings(address) if "API keys" in warning]


@pytest.mark.parametrize("keys", ["RINGMESH_API_KEYS", "RINGMESH_JWT_KEYS"])
def test_a_router_that_other_hosts_reach_is_a_warning_unless_callers_need_keys(keys, monkeypatch):
    monkeypatch.delenv("RINGMESH_API_KEYS", raising=False)
    monkeypatch.delenv("RINGMESH_JWT_KEYS", raising=False)
    (warning,) = about_keys("0.0.0.0:8500")
    assert "0.0.0.0:8500 is open to other hosts" in warning
    assert not about_keys("127.0.0.1:8500")
    monkeypatch.setenv(keys, "/keys")
    assert not about_keys("0.0.0.0:8500")
