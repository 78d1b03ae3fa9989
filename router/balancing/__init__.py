"""Which worker a request is sent to: the ring, and bounded load."""
