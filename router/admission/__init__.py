"""Admission control: quotas of tenants, and a concurrency limit for each worker and model."""
