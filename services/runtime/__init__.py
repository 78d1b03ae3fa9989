"""What every service needs to be one: settings, server, errors, telemetry, shutdown."""
