"""Where answers are kept: this process's memory, and Redis."""
