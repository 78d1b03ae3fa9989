"""What `ringmesh cost` can group by. A module of its own, because the command line imports it at each start."""

from __future__ import annotations

from enum import StrEnum


class By(StrEnum):
    """What costs are grouped by."""

    TENANT = "tenant"
    MODEL = "model"
    VERSION = "version"
    REGION = "region"
    DAY = "day"
    REQUEST = "request"
