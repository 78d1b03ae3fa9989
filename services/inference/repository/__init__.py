"""Model repositories and configurations."""
