"""Code that every service shares: settings, server, errors, telemetry, shutdown."""
