"""`python -m cache`."""

from services.runtime import start

start.prepare()

from cache.main import main  # noqa: E402

main()
