"""Requests and responses as tensors."""
