"""The path of a request through the router."""
