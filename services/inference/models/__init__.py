"""The models that a worker serves."""
