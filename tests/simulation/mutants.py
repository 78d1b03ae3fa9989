"""Mutants: former faults of Ringmesh, reintroduced one at a time to prove that the simulation finds them.

Each mutant edits sources at import. An edit fails if its text is not found: the code has changed then, and the mutant
must be rewritten.
"""

import importlib.machinery
import sys

_NO_BORDER = ("    for name, text in (\n", "    return\n    for name, text in (\n")

MUTANTS = {
    # A full tier emptied its heap, and every put raised: compiled code boxes floats anew, so `is` was never true.
    "eviction": {
        "cache.tiers.local_tier": [
            (
                "entry.worth != worth:\n                continue",
                "entry.worth + 0.0 is not worth:\n                continue",
            ),
            ("<= target or not heap:", "<= target:"),
        ]
    },
    # Shapes that ran fast before were run on the event loop, even if the run time depends on the values.
    "blocking run": {"services.inference.execution.inline_runs": [("    if unknown:\n", "    if False:\n")]},
    # Requests that waited for a stopped worker were sent to it again.
    "resend": {
        "router.transport.worker_client": [
            (
                '        self._close(LinkClosedError("it stopped answering"))\n',
                "        for envelope, cancel in list(self._envelopes.items()):\n"
                "            cancel()\n"
                '            silent = CallError(grpc.StatusCode.UNAVAILABLE, "it stopped answering")\n'
                "            self._answered(envelope, silent)\n",
            )
        ]
    },
    # After an unexpected exception in a flight, its callers never got an answer.
    "flight": {
        "services.runtime.single_flight": [
            (
                "Driver(work, flight.end)",
                "Driver(work, lambda end: isinstance(end, ArithmeticError) or flight.end(end))",
            )
        ]
    },
    # Requests whose worker did not answer outlived their deadline.
    "deadline": {"services.runtime.driver": [("        self._throw(DeadlinePassed())", "        pass")]},
    # Background work ended at its first unexpected exception.
    "background": {
        "services.runtime.telemetry.supervisor": [
            ("if await self._run_once(name, work) or _is_cancelled():", "await work()\n            if True:")
        ],
        "router.membership.worker_description": [_NO_BORDER],
    },
    # The death of a worker was not counted while a hedge was in flight.
    "hedged poison": {
        "router.dispatch.attempts": [
            (
                "self._ended += isinstance(outcome, WorkerLostError)\n",
                "self._ended += isinstance(outcome, WorkerLostError) and not self._under_way\n",
            )
        ]
    },
    # Queue timeouts were only noticed when an instance became free.
    "queue timeout": {
        "services.inference.scheduling.request_queue": [("        if at < self._timer_at:\n", "        if False:\n")]
    },
    # A Redis that stopped answering stopped discovery for ever.
    "silent redis": {
        "services.runtime.redis.discovery": [(', "socket_timeout": TIMEOUT_SECONDS}', "}")],
    },
    # A process that purged assumed that it already knew all earlier purges of others.
    "purges at once": {
        "cache.keys.invalidation": [
            (
                "self._run(_BEAT, self._member, str(self._version_read))",
                "self._run(_BEAT, self._member, str(self.epochs.version))",
            )
        ]
    },
    # A worker that had missed a load was used with the replaced model.
    "missed load": {
        "router.membership.fleet": [
            ("missed = missed_decisions(member, newest)\n", "missed: dict[str, Member] = {}\n"),
        ]
    },
    # The same, once the workers that had not missed it were lost.
    "lost decision": {
        "router.membership.fleet": [
            (
                "newest_decisions(self._members.values())",
                "newest_decisions(member for member in self._members.values() if member.healthy)",
            )
        ]
    },
}
# The plans of what they break, which find them soonest.
PLANS = {
    "eviction": "costs",
    "blocking run": "slow_request",
    "resend": "stopped_worker",
    "flight": "exceptions",
    "deadline": "network",
    "background": "lies",
    "hedged poison": "poison",
    "queue timeout": "queue",
    "silent redis": "redis_faults",
    "purges at once": "costs",
    "missed load": "replacement",
    "lost decision": "replacement",
}


def apply(name):
    """Makes later imports load their modules with this fault."""
    sys.meta_path.insert(0, _Finder(MUTANTS[name]))


class _Finder:
    def __init__(self, edits):
        self._edits = edits

    def find_spec(self, fullname, path, target=None):
        edits = self._edits.get(fullname)
        if edits is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        spec.loader = _Loader(fullname, spec.origin)
        spec.loader.edits = edits
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    edits = ()

    def path_stats(self, path):
        raise OSError("what is compiled from the file as it is must not be used")

    def source_to_code(self, data, path, **_):
        text = bytes(data).decode()
        for old, new in self.edits:
            assert text.count(old) == 1, f"{path} has {old!r} {text.count(old)} times"
            text = text.replace(old, new)
        return compile(text, path, "exec", dont_inherit=True)
