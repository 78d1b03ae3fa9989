"""Attempts at a request: at which worker, how often, and for how long."""
