"""What each tenant may use of a router at most: bytes of requests, requests at once, and a share of the local tier.

Quotas of computed requests are in quotas.py, budgets in router/accounting/budgets.py.
"""

from __future__ import annotations  # compiled by mypyc

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping

from cache.tiers.local_tier import LocalTier
from router.accounting.dispatch_metrics import SHEDS
from router.admission.caller import Caller, RefusedError
from router.admission.quotas import OTHERS, Quotas
from services.runtime.telemetry.metrics import Sample

_RETRY_SECONDS = 0.1
# Of an entry in the local tier, besides key and value.
_OVERHEAD_BYTES = 300
# Answers that are looked at for each one that is added, so that those that were evicted are forgotten.
_CHECKED = 2


class TenantLimits:
    """The limits, by tenant; OTHERS stands for each tenant that is not named. A tenant in none of them has no limit."""

    def __init__(
        self,
        byte_quotas: Mapping[str, float],
        concurrency_quotas: Mapping[str, int],
        cache_quotas: Mapping[str, float],
        local: LocalTier,
        clock: Callable[[], float],
    ) -> None:
        """`byte_quotas` a second; `cache_quotas`: shares of the local tier, 0 to 1."""
        self.bytes = Quotas(byte_quotas, clock, "bytes of requests", "bytes")
        self.concurrency = Concurrency(concurrency_quotas)
        self.cache = CacheShares(cache_quotas, local)

    def samples(self) -> Iterator[Sample]:
        yield from self.bytes.samples()
        yield Sample(SHEDS, ("concurrency",), self.concurrency.refused)


class Concurrency:
    """Requests that wait for a cache or a worker, by tenant. Answers from the local tier take no time."""

    def __init__(self, limits: Mapping[str, int]) -> None:
        self._limits = limits
        self._under_way: dict[str, int] = {}
        self.refused = 0

    def begin(self, caller: Caller) -> None:
        """Counts a request. Raises RefusedError if the tenant has as many as it may."""
        tenant = caller.tenant
        now = self._under_way.get(tenant, 0)
        limit = self._limits.get(tenant, self._limits.get(OTHERS))
        if limit is not None and now >= limit:
            self.refused += 1
            raise RefusedError(
                f"tenant {tenant!r} has {limit} requests under way, as many as it may have at once; retry when one "
                "has ended",
                caller,
                retry_after=_RETRY_SECONDS,
                kind="concurrency",
            )
        self._under_way[tenant] = now + 1

    def end(self, caller: Caller) -> None:
        """Counts a request as ended."""
        left = self._under_way[caller.tenant] - 1
        if left:
            self._under_way[caller.tenant] = left
        else:
            del self._under_way[caller.tenant]


class CacheShares:
    """Removes a tenant's oldest answers from the local tier when all of them take more than the tenant's share.

    An answer that tenants share counts for the one that it was computed for.
    """

    def __init__(self, shares: Mapping[str, float], local: LocalTier) -> None:
        self._shares = shares
        self._local = local
        # The bytes of each answer by its key, the oldest first; and their sum.
        self._answers: dict[str, OrderedDict[bytes, int]] = {}
        self._bytes: dict[str, int] = {}
        self._to_check: deque[tuple[str, bytes]] = deque()

    def keep(self, tenant: str, key: bytes, size: int) -> None:
        """Counts an answer of `size` bytes that was stored."""
        share = self._shares.get(tenant, self._shares.get(OTHERS))
        if share is None:
            return
        self._forget(tenant, key)
        size += len(key) + _OVERHEAD_BYTES
        answers = self._answers.setdefault(tenant, OrderedDict())
        answers[key] = size
        self._bytes[tenant] = self._bytes.get(tenant, 0) + size
        self._to_check.append((tenant, key))
        while self._bytes.get(tenant, 0) > share * self._local.capacity:
            oldest = next(iter(answers))
            self._local.remove(oldest)
            self._forget(tenant, oldest)
        for _ in range(_CHECKED):
            if self._to_check:
                self._check(*self._to_check.popleft())

    def _check(self, tenant: str, key: bytes) -> None:
        if key not in self._answers.get(tenant, ()):
            return
        if self._local.peek(key) is None:
            self._forget(tenant, key)
        else:
            self._to_check.append((tenant, key))

    def _forget(self, tenant: str, key: bytes) -> None:
        answers = self._answers.get(tenant)
        if answers is None or key not in answers:
            return
        self._bytes[tenant] -= answers.pop(key)
        if not answers:
            del self._answers[tenant], self._bytes[tenant]
