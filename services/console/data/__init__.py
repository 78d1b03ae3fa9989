"""The data of the console's pages: metrics, traces and events."""
