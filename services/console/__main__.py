"""`python -m services.console`."""

from services.runtime.machine import startup

startup.begin()

from services.console.main import main  # noqa: E402

main()
