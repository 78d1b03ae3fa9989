import re

import asyncpg
import pytest

from services.ledger.storage import database
from services.runtime.errors import UnavailableError


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError("gone"),
        asyncpg.InterfaceError("connection is closed"),
        asyncpg.InternalClientError("cannot switch to state 15; another operation (2) is in progress"),
        asyncpg.AdminShutdownError("terminating connection due to administrator command"),
    ],
)
async def test_a_session_that_fails_is_a_reason_to_come_again(error):
    class Pool:
        def acquire(self):
            raise error

    opened = database.Database("postgresql://nowhere", None)
    opened._reports = Pool()
    with pytest.raises(UnavailableError, match=re.escape(str(error))):
        async with opened.reading():
            pass
