"""From batches of routers to rows, once in effect."""
