"""Metrics and costs of requests and attempts."""
