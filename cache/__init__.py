"""The cache: keys, tiers, policy, peer regions and the gRPC service."""
