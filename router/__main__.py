"""`python -m router`."""

from services.runtime.machine import startup

startup.use_tcmalloc()
startup.begin()

from router.main import main  # noqa: E402

main()
