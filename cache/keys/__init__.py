"""Keys of answers, and their invalidation by purges."""
