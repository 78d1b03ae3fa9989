"""`python -m services.cli`: the command `ringmesh` where no script is installed."""

from services.cli.main import app

app()
