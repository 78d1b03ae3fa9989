"""`python -m cache`."""

from services.runtime.process import start

start.prepare()

from cache.main import main  # noqa: E402

main()
