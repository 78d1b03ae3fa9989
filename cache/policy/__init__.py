"""Cache policy: admission, freshness, leases and renewals."""
