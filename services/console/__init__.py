"""The console: shows the state of the fleet in a browser."""
