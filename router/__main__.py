"""`python -m router`."""

from services.runtime.process import start

start.prepare()

from router.main import main  # noqa: E402

main()
