"""The services of a Ringmesh, one package each."""
