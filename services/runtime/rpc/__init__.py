"""gRPC servers on both engines."""
