"""Load balancing: selects the worker for a request by the ring, with bounded loads."""
