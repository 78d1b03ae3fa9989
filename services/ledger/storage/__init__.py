"""PostgreSQL: the process, connections, tables."""
