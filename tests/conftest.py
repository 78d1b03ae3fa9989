"""Hypothesis on machines that are busy with other things: how long an example takes proves nothing."""

from hypothesis import HealthCheck, settings

settings.register_profile("ringmesh", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ringmesh")
