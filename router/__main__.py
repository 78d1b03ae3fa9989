"""`python -m router`."""

from router.main import main

main()
