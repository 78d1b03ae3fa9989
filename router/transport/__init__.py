"""Transports to a worker: gRPC, or a local socket on the same host."""
