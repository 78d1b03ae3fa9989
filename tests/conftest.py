"""Hypothesis on machines that are busy with other things: how long an example takes proves nothing.

With RINGMESH_TEST_COMPILED=1 the tests import the modules that services run, compiled by mypyc, and not their sources.
"""

import os

import pytest
from hypothesis import HealthCheck, settings

from services.runtime.machine import compiled

settings.register_profile("ringmesh", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ringmesh")

if os.environ.get("RINGMESH_TEST_COMPILED"):
    compiled.use()
    if not compiled.is_used():
        pytest.exit("nothing is compiled from these sources; run `make .venv/.compiled`", returncode=1)


def sources_only(reason: str) -> pytest.MarkDecorator:
    """For a test that cannot run on compiled modules; the reasons are listed with `-rs`."""
    return pytest.mark.skipif(compiled.is_used(), reason=f"only on sources: {reason}")
