"""The console: what the fleet does, in a browser."""
