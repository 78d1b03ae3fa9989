"""The ledger: what requests used, what that cost, and what the cache saved."""
