"""What the machine and this process offer."""
