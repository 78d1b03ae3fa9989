"""Who may have something computed now: quotas of tenants, and a limit on what is under way to each worker."""
