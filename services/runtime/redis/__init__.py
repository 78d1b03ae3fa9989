"""Connections to Redis, and worker discovery through it."""
