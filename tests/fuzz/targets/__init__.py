"""All targets, by what sends the bytes."""

from tests.fuzz.target import TARGETS
from tests.fuzz.targets import callers, connections, files, metadata, processes, web

__all__ = ["TARGETS", "callers", "connections", "files", "metadata", "processes", "web"]
