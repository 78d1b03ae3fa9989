"""`python -m services.ledger`."""

import os

# It starts PostgreSQL: gRPC's handlers of a fork are of no use to a child that becomes another program.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

from services.ledger.main import main

main()
