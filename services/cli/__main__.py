"""`python -m services.cli`: the command `ringmesh` without an installed script."""

from services.cli.main import app

app()
