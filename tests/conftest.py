"""Hypothesis on machines that are busy with other things: how long an example takes proves nothing.

With RINGMESH_TEST_COMPILED=1 the tests import what is installed, compiled by mypyc, and not the sources.
"""

import os

import pytest
from hypothesis import HealthCheck, settings

from tests import installation

# The same examples in each run; simulation and fuzzing look for new ones.
settings.register_profile("ringmesh", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ringmesh")

installation.choose()

from services.runtime.machine import startup  # noqa: E402

# As in the processes of services, and before they are imported here.
startup.begin()


def sources_only(reason: str) -> pytest.MarkDecorator:
    """For a test that cannot run on compiled modules; the reasons are listed with `-rs`."""
    return pytest.mark.skipif("RINGMESH_TEST_COMPILED" in os.environ, reason=f"only on sources: {reason}")
