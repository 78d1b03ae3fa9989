"""The models that a worker holds."""
