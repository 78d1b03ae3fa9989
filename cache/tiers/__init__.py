"""The cache tiers: the memory of this process, and Redis."""
