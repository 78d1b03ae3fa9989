"""The public gRPC service, the ring, membership and forwarding."""
