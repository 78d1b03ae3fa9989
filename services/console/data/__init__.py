"""What the console's pages show: metrics, traces and events."""
