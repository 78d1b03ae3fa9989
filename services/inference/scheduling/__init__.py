"""Queues, batches and sequences."""
