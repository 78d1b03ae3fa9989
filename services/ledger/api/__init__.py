"""The gRPC face of the ledger."""
