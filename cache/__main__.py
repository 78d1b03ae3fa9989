"""`python -m cache`."""

from services.runtime.machine import memory

memory.use_tcmalloc()

from cache.main import main  # noqa: E402

main()
