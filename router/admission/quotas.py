"""Quotas: computed requests, or bytes of requests, a second for each tenant."""

from __future__ import annotations  # compiled by mypyc

from collections.abc import Callable, Iterator, Mapping

from router.accounting.dispatch_metrics import SHEDS
from router.admission.caller import Caller, RefusedError
from services.runtime.telemetry.metrics import Sample
from services.runtime.token_bucket import TokenBucket

# The key of the quota for tenants without one of their own.
OTHERS = "*"
_MANY = 10_000


class Quotas:
    """A token bucket for each tenant, in `what` a second, with a burst of one second's worth.

    A tenant that is not in `rates` has its own bucket at the rate of OTHERS, or no limit if that is not set.
    """

    def __init__(
        self,
        rates: Mapping[str, float],
        clock: Callable[[], float],
        what: str = "computed requests",
        reason: str = "quota",
    ) -> None:
        self._what = what
        self._reason = reason
        self._rates = rates
        self._clock = clock
        self._buckets: dict[str, TokenBucket] = {}
        self._sweep_at = _MANY
        self.refused = 0

    def samples(self) -> Iterator[Sample]:
        yield Sample(SHEDS, (self._reason,), self.refused)

    def take(self, caller: Caller, amount: float = 1.0) -> None:
        """Takes `amount` from the quota of the caller's tenant. Raises RefusedError if it is used up."""
        if not self._rates:
            return
        rate = self._rates.get(caller.tenant, self._rates.get(OTHERS))
        if rate is None:
            return
        bucket = self._buckets.get(caller.tenant)
        if bucket is None:
            if len(self._buckets) >= self._sweep_at:
                # Drops full buckets, which equal new ones. Runs rarely, however many tenants keep partly used buckets.
                self._buckets = {tenant: kept for tenant, kept in [*self._buckets.items()] if not kept.full}
                self._sweep_at = max(_MANY, 2 * len(self._buckets))
            bucket = self._buckets[caller.tenant] = TokenBucket(rate, max(1.0, rate), self._clock)
        if seconds := bucket.take(amount):
            self.refused += 1
            raise RefusedError(
                f"tenant {caller.tenant!r} has used up its quota of {rate:g} {self._what} a second; "
                f"retry in {seconds:.3f} s",
                caller,
                retry_after=seconds,
                kind=self._reason,
            )
