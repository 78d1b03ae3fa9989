"""Connections to Redis, and workers announced there."""
