"""Sessions of browsers that have signed in with an API key or a token. They are in memory: a restart ends them."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from services.runtime.errors import ResourceExhaustedError, UnauthenticatedError
from services.runtime.rpc.identity import Identity
from services.runtime.token_bucket import TokenBucket

# A session ends so long after the sign-in, or after the last request.
SECONDS, IDLE_SECONDS = 12 * 3600.0, 3600.0
# The oldest session of a key or token makes room for another.
MOST_OF_A_HOLDER = 16
# Attempts to sign in from one address.
ATTEMPTS, ATTEMPTS_A_SECOND = 10, 0.2
_MOST_ADDRESSES = 4096


@dataclass(slots=True)
class Session:
    """`authorization`: the key or token, as metadata. `holder`: its kind and id. Times in seconds."""

    authorization: str
    holder: str
    ends: float
    idle_ends: float


class Sessions:
    """The sessions by their random tokens. `identify` returns whose key or JWT an `authorization` is. Raises
    UnauthenticatedError, and UnavailableError if that cannot be decided yet."""

    def __init__(self, identify: Callable[[str], Identity], clock: Callable[[], float] = time.monotonic) -> None:
        self._identify = identify
        self._clock = clock
        # The oldest first.
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._attempts: dict[str, TokenBucket] = {}

    def open(self, key: str, address: str) -> str:
        """Starts a session and returns its token. `address`: of the browser.

        Raises ResourceExhaustedError after too many attempts from that address, and the errors of `identify`.
        """
        if seconds := self._bucket(address).take():
            error = ResourceExhaustedError(f"too many attempts to sign in from {address}; retry in {seconds:.0f} s")
            error.retry_after = seconds
            raise error
        authorization = f"Bearer {key}"
        holder = str(self._identify(authorization))
        now = self._clock()
        for token in [token for token, session in self._sessions.items() if session.ends <= now]:
            del self._sessions[token]
        same = [token for token, session in self._sessions.items() if session.holder == holder]
        for token in same[: max(0, len(same) + 1 - MOST_OF_A_HOLDER)]:
            del self._sessions[token]
        token = secrets.token_urlsafe(32)
        self._sessions[token] = Session(authorization, holder, now + SECONDS, now + IDLE_SECONDS)
        return token

    def find(self, token: str) -> tuple[Identity, str]:
        """Returns whose session it is, and the metadata for calls in that name. Raises UnauthenticatedError if it has
        ended, or its key was revoked or has expired."""
        session, now = self._sessions.get(token), self._clock()
        if session is None or now >= min(session.ends, session.idle_ends):
            self.close(token)
            raise UnauthenticatedError("this needs a session, from a sign-in in a browser, or an API key")
        try:
            identity = self._identify(session.authorization)
        except UnauthenticatedError:
            self.close(token)
            raise
        session.idle_ends = now + IDLE_SECONDS
        return identity, session.authorization

    def is_open(self, token: str) -> bool:
        """Whether `find` returns it."""
        try:
            self.find(token)
        except UnauthenticatedError:
            return False
        return True

    def close(self, token: str) -> None:
        """Ends a session."""
        self._sessions.pop(token, None)

    def _bucket(self, address: str) -> TokenBucket:
        if len(self._attempts) >= _MOST_ADDRESSES:
            self._attempts = {one: bucket for one, bucket in self._attempts.items() if not bucket.full}
            if len(self._attempts) >= _MOST_ADDRESSES:
                del self._attempts[next(iter(self._attempts))]
        if address not in self._attempts:
            self._attempts[address] = TokenBucket(ATTEMPTS_A_SECOND, ATTEMPTS, self._clock)
        return self._attempts[address]
