"""Starting and supervising the processes of `ringmesh up`."""
