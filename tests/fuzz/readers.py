"""All targets, by what sends the bytes. Apart from their packages: a process that runs one imports no others."""

from tests.fuzz.target import TARGETS
from tests.fuzz.targets import callers, connections, files, identities, metadata, processes, reports, web

__all__ = ["TARGETS", "callers", "connections", "files", "identities", "metadata", "processes", "reports", "web"]
