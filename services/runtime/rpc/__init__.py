"""gRPC servers on both engines: pygrpc-native and grpcio."""
