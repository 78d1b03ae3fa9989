"""The worker's gRPC services and its local socket."""
