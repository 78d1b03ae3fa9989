"""`python -m cache`."""

from cache.main import main

main()
