"""Start, configuration and shutdown of a service process."""
