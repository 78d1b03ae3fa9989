"""Dispatch: sends requests to workers, with retries, hedging and a retry budget."""
