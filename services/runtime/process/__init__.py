"""How a service process starts, is configured and stops."""
