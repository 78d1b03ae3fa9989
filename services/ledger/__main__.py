"""`python -m services.ledger`."""

import os

from services.runtime.machine import startup

# It starts PostgreSQL: gRPC's handlers of a fork are of no use to a child that becomes another program.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
startup.begin()

from services.ledger.main import main  # noqa: E402

main()
