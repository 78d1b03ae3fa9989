"""The subcommands of `ringmesh`."""
