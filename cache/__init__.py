"""Keys, the local tier, the shared tier and their gRPC service."""
