"""`python -m cache`."""

from services.runtime.machine import startup

startup.use_tcmalloc()
startup.begin()

from cache.main import main  # noqa: E402

main()
