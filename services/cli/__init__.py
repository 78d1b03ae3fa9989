"""The `ringmesh` command."""
