"""Look-ups in the caches of other regions, and replication between regions."""
