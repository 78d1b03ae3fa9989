"""The cache service and its metrics."""
