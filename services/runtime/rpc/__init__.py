"""gRPC servers on both engines: our own and grpcio."""
