"""`python -m router`."""

from services.runtime.machine import memory

memory.use_tcmalloc()

from router.main import main  # noqa: E402

main()
